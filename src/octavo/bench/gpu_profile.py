"""Where a step's time goes on the GPU: kernels by name, with the time in which none of them ran.

    python -m octavo.bench.gpu_profile --model llama-3.1-8b --decode 1,64,256 --prefill 512,2048

The same hand-written plans as ``octavo bench gpu``; recorded by torch's profiler, so graphs are looked into as well. The
step's own time is taken without the profiler, which slows it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from octavo import host
from octavo.bench.gpu import decode, numbers, prefill
from octavo.config import EngineOptions
from octavo.protocol.generate import SamplingParams
from octavo.runner.runner import TorchRunner

CONTEXT = 512  # tokens that decode rows see
STEPS = 16
WIDEST_NAME = 60


class Entry(Protocol):
    """What is read of a line of the profiler's averages."""

    key: str
    count: int
    self_device_time_total: float


@dataclass
class Kernel:
    """One kernel in one step: how often, and microseconds in all."""

    name: str
    calls: float
    us: float


def kernels(entries: Iterable[Entry], steps: int) -> list[Kernel]:
    """Kernels by time, for one step of ``steps``."""
    found = [
        Kernel(entry.key, entry.count / steps, entry.self_device_time_total / steps)
        for entry in entries
        if entry.self_device_time_total > 0
    ]
    return sorted(found, key=lambda kernel: -kernel.us)


def profiled(work: Callable[[], float], steps: int) -> tuple[float, list[Kernel]]:
    """(seconds a step without the profiler, kernels of a step)."""
    seconds = work()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        work()
    averages: Any = recorded.key_averages()
    return seconds, kernels(averages, steps)


def table(name: str, step_us: float, found: list[Kernel], most: int) -> str:
    """The longest kernels of a step, and what is left."""
    busy = sum(kernel.us for kernel in found)
    calls = sum(kernel.calls for kernel in found)
    lines = [
        f"{name}: {step_us:.0f} us a step, {busy:.0f} us in {calls:.0f} kernels, {step_us - busy:.0f} us between them"
    ]
    for kernel in found[:most]:
        lines.append(
            f"  {kernel.us:9.1f} us {kernel.us / step_us:6.1%} {kernel.calls:6.1f} x  {kernel.name[:WIDEST_NAME]}"
        )
    rest = found[most:]
    if rest:
        lines.append(f"  {sum(kernel.us for kernel in rest):9.1f} us in {len(rest)} others")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="gpu_profile", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default="llama-3.1-8b", help="built-in shape, run with random weights")
    parser.add_argument("--quantization", default=None, help="fp8")
    parser.add_argument("--decode", default="1,64,256", help="decode rows, comma separated")
    parser.add_argument("--prefill", default="512,2048", help="prompt tokens of a step, comma separated")
    parser.add_argument("--most", type=int, default=14, help="kernels to print")
    parser.add_argument("--json", type=Path, help="write everything here")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("There is no CUDA device here; run this on a machine with an NVIDIA GPU.", file=sys.stderr)
        return 2
    options = EngineOptions.of(
        model=args.model,
        load_format="dummy",
        device="cuda",
        max_model_len="8192",
        max_num_seqs=256,
        quantization=args.quantization,
    )
    runner = host.build_runner(options, host.open_files(options)).runner
    if not isinstance(runner, TorchRunner):
        raise TypeError("the profile drives the torch runner")
    greedy = SamplingParams(temperature=0.0, max_tokens=4096)
    works: list[tuple[str, Callable[[], float], int]] = [
        # ``decode`` runs four steps before those it times.
        (f"decode x{rows}", partial(decode, runner, rows, CONTEXT, STEPS, greedy), STEPS + 4)
        for rows in numbers(args.decode)
    ]
    works += [(f"prefill {size}", partial(prefill, runner, 1, size, 4), 5) for size in numbers(args.prefill)]
    everything = {}
    for name, work, steps in works:
        seconds, found = profiled(work, steps)
        everything[name] = {"step_us": 1e6 * seconds, "kernels": [asdict(kernel) for kernel in found]}
        print(table(name, 1e6 * seconds, found, args.most), flush=True)
        if args.json:
            args.json.write_text(json.dumps(everything, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
