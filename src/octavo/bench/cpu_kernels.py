"""``octavo bench cpu MODEL``: where the time of a step on the compiled CPU path goes, kernel by kernel, beside the machine's ceilings.

Every instruction is timed inside the parallel region by the processor's counter, on every thread; the table shows what
nine of ten steps take at least, so that what else runs on the machine counts little. Per kernel: calls in a step, milliseconds in it and
behind it at the barrier (mean of the threads), GB/s of weights and 8-bit GOP/s (two a multiplication) of all threads,
and the share of the roofline: what its bytes would take at the read bandwidth or its products at the multiplication
rate, whichever is more, over the time that passed. Both ceilings are measured in the same run, reading as much memory as a
pass reads of weights.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from octavo import host
from octavo.bench.feed import Feeder
from octavo.bench.metrics import percentile
from octavo.config import EngineOptions
from octavo.device.kernels.numba import probe
from octavo.errors import UsageError
from octavo.protocol.generate import SamplingParams
from octavo.runner.cpu.program import Program, Tape, aligned
from octavo.runner.cpu.runner import CPURunner

PROBE_ROUNDS = 400_000
NANO = 1e9


@dataclass(frozen=True)
class Ceilings:
    """Of all threads together: bytes a second read in order, 8-bit operations a second; ticks a second of the counter."""

    read_bytes: float
    operations: float
    ticks: float


@dataclass(frozen=True)
class KernelRow:
    """One kernel in one kind of step."""

    step: str
    kernel: str
    calls: int
    ms: float
    wait_ms: float
    gb_per_s: float
    gop_per_s: float
    roofline: float


class Stopwatch:
    """Collects the times of every tape that a team runs, by tape."""

    def __init__(self) -> None:
        self.runs: dict[int, list[NDArray[np.int64]]] = {}
        self.tapes: dict[int, Tape] = {}

    def __call__(self, tape: Tape, times: NDArray[np.int64], elapsed_s: float) -> None:
        self.tapes[id(tape)] = tape
        self.runs.setdefault(id(tape), []).append(times)


class Load:
    """Equal greedy sequences, step by step through the runner."""

    def __init__(self, runner: CPURunner, rows: int, room: int) -> None:
        self.runner, self.rows = runner, rows
        self.feeder = Feeder(runner, rows, room, SamplingParams(temperature=0.0, max_tokens=4096))

    def run(self, start: int, count: int) -> None:
        """Every sequence computes ``count`` tokens from ``start`` on; at 0 they begin anew."""
        histories = None
        if start == 0:
            rng = np.random.default_rng(self.feeder.step)
            histories = rng.integers(0, self.runner.vocab_size, (self.rows, count)).tolist()
        self.runner.forward(self.feeder.plan([start] * self.rows, [count] * self.rows, histories))
        self.runner.sample([])
        self.runner.collect()


def ceilings(runner: CPURunner) -> Ceilings:
    """Best of several rounds on the runner's own threads: whatever disturbs only makes them slower. As much memory is read
    as one pass reads of weights: part of it may stay in a cache there too."""
    kib = max(1 << 16, runner.lowered.weight_bytes >> 10)
    memory = aligned(kib << 10, np.uint8)
    memory[:] = 1
    scratch = aligned(128 * runner.team.threads, np.uint8, zero=True)
    program = Program(runner.library)
    program.add("probe_read", [memory.ctypes.data, kib, scratch.ctypes.data])
    read = program.tape()
    program.add("probe_dot", [PROBE_ROUNDS, scratch.ctypes.data])
    dot = program.tape()
    found: dict[int, list[float]] = {id(read): [], id(dot): []}
    rates: list[float] = []

    def watch(tape: Tape, times: NDArray[np.int64], elapsed_s: float) -> None:
        found[id(tape)].append(elapsed_s)
        rates.append(float(times[0, -1] - times[0, 0]) / elapsed_s)

    runner.team.watch = watch
    for _ in range(25):
        runner.team.active = runner.team.threads
        runner.team.run(read)
        runner.team.active = runner.team.threads
        runner.team.run(dot)
    runner.team.watch = None
    operations = 2 * probe.PRODUCTS * PROBE_ROUNDS * runner.team.threads
    return Ceilings(
        (kib << 10) / min(found[id(read)]), operations / min(found[id(dot)]), percentile(rates, 50)
    )


def table(name: str, tokens: int, heads: int, steps: int, watch: Stopwatch, top: Ceilings) -> list[KernelRow]:
    """Rows of one kind of step, longest first; ``tokens`` computed a step, ``heads`` of them with logits."""
    sums: dict[str, list[float]] = {}
    for key, found in watch.runs.items():
        tape, per_step = watch.tapes[key], len(found) / steps  # a prompt is computed in several chunks
        threads = max(len(times) for times in found)
        stack = np.stack([times for times in found if len(times) == threads]).astype(np.float64)
        # Seconds in each kernel and behind it [2 x instructions].
        spans = np.percentile(np.diff(stack, axis=2), 10, axis=0).mean(axis=0) / top.ticks
        is_head = tape.facts[-1].kernel in ("linear_split8", "refine") or len(tape) < 8
        for index, fact in enumerate(tape.facts):
            row = sums.setdefault(fact.kernel, [0.0] * 5)
            count = heads if is_head else tokens / per_step
            values = (1, spans[2 * index], spans[2 * index + 1], fact.nbytes, 2 * fact.products * count)
            for place, value in enumerate(values):
                row[place] += value * per_step
    rows = []
    for kernel, (calls, busy, wait, nbytes, operations) in sums.items():
        least = max(nbytes / top.read_bytes, operations / top.operations)
        rates = nbytes / busy / NANO, operations / busy / NANO
        rows.append(KernelRow(name, kernel, round(calls), busy * 1e3, wait * 1e3, *rates, least / busy))
    return sorted(rows, key=lambda row: -row.ms)


def measure(runner: CPURunner, top: Ceilings, steps: int) -> list[KernelRow]:
    """Decoding of 1 and 8 sequences from a context of 16, and a prompt of 512."""
    rows: list[KernelRow] = []
    for name, count, tokens in (("1 stream", 1, 1), ("8 streams", 8, 1), ("prompt of 512", 1, 512)):
        load = Load(runner, count, max(512, 16 + steps + 8))
        load.run(0, 16)
        load.run(16, 1)
        watch = runner.team.watch = Stopwatch()
        number = steps if tokens == 1 else max(3, steps // 20)
        for at in range(17, 17 + number):
            load.run(at if tokens == 1 else 0, tokens)
        runner.team.watch = None
        rows += table(name, count * tokens, count, number, watch, top)
    return rows


def render(rows: list[KernelRow], top: Ceilings, name: str, threads: int) -> str:
    """The tables as text."""
    lines = [
        f"{name}: {threads} threads read {top.read_bytes / NANO:.1f} GB/s, multiply {top.operations / NANO:.0f} GOP/s (8 bit)"
    ]
    for step in dict.fromkeys(row.step for row in rows):
        mine = [row for row in rows if row.step == step]
        total = sum(row.ms + row.wait_ms for row in mine)
        waits = sum(row.wait_ms for row in mine)
        lines.append(f"\n{step}: {total:.3f} ms in the tapes, {waits / total:.0%} of it at barriers")
        lines.append(
            f"{'kernel':<16}{'calls':>6}{'ms':>9}{'wait ms':>9}{'GB/s':>8}{'GOP/s':>8}{'roofline':>10}"
        )
        for row in mine:
            share = f"{row.roofline:.0%}" if row.gop_per_s else "-"
            lines.append(
                f"{row.kernel:<16}{row.calls:>6}{row.ms:>9.3f}{row.wait_ms:>9.3f}{row.gb_per_s:>8.1f}"
                f"{row.gop_per_s:>8.0f}{share:>10}"
            )
    return "\n".join(lines)


def main(args: argparse.Namespace, options: EngineOptions) -> int:
    """Load the model, measure, print, write JSON where asked."""
    built = host.build_runner(options, host.open_files(options))
    runner = built.runner
    if not isinstance(runner, CPURunner):
        raise UsageError(
            f"{options.model.model} runs on the torch path here.", "octavo doctor MODEL says why."
        )
    try:
        top = ceilings(runner)
        rows = measure(runner, top, args.steps)
        print(render(rows, top, built.device, runner.team.threads))
        print(f"\nThe weights of one pass: {runner.lowered.weight_bytes / 1e6:.1f} MB.")
    finally:
        runner.close()
    if args.output_json:
        content = {"ceilings": asdict(top), "rows": [asdict(row) for row in rows]}
        Path(args.output_json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0
