"""Measurements by several processes, a GPU each: every rank runs the same lines, rank 0 prints."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from octavo.device.platform.base import Platform
from octavo.engine.executor.crew import LOOPBACK, NO_MULTICAST

CALLS = 20  # sums in a recorded graph: one launch of the host for all of them
REPLAYS = 10


def add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``run_ranks`` tells its processes."""
    parser.add_argument("--rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", default="", help=argparse.SUPPRESS)


def run_ranks(module: str, argv: list[str], count: int) -> int:
    """Run ``python -m module argv`` as ``count`` ranks; when one fails the others are ended. Returns the worst status."""
    environment = {**NO_MULTICAST, **os.environ, **LOOPBACK}
    with tempfile.TemporaryDirectory(prefix="octavo-") as folder:
        command = [sys.executable, "-m", module, *argv, "--meeting", folder]
        ranks = [subprocess.Popen([*command, "--rank", str(rank)], env=environment) for rank in range(count)]
        try:
            while True:
                states = [rank.poll() for rank in ranks]
                if any(states) or None not in states:
                    return max((abs(state) for state in states if state is not None), default=1)
                time.sleep(0.05)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()


def leave() -> NoReturn:
    """End a rank at once: taking leave of the others in order is not worth a hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def sum_seconds(reduce: Callable[[Tensor], Tensor], x: Tensor, platform: Platform) -> float:
    """Seconds a sum over the ranks of tensors like ``x`` (zeros stay zeros), from a recording of many in a row."""

    def work() -> None:
        for _ in range(CALLS):
            reduce(x)

    with torch.inference_mode():
        work()
        platform.synchronize()
        recorded = platform.capture(work, None)
        if recorded is None:
            raise RuntimeError("this device records nothing")
        replay = recorded[0]
        replay()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(REPLAYS):
            replay()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / REPLAYS / CALLS


def in_turn(works: list[Callable[[], float]]) -> list[float]:
    """The least of three rounds of each, one after the other, so that no one has the quiet moment alone."""
    rounds = [[work() for work in works] for _ in range(3)]
    return [min(each) for each in zip(*rounds)]


def both(
    first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], x: Tensor, platform: Platform
) -> list[float]:
    """Seconds a sum by each of two ways."""
    return in_turn([partial(sum_seconds, way, x, platform) for way in (first, second)])
