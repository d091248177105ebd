"""``octavo bench gpu``: what the runner itself can do on this device, against the floors measured in the same run.

Decode: N rows at a given context, graph replays back to back. Prefill: one step of T tokens. Random weights of a
built-in shape; plans are written by hand, so neither scheduler nor HTTP is in the figure.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from octavo import host
from octavo.bench.ranks import add_rank_arguments, leave, run_ranks, sum_seconds
from octavo.config import EngineOptions
from octavo.device.platform.select import open_platform
from octavo.engine.cache.spec import ceil_div
from octavo.engine.executor.base import Seat
from octavo.host.built import Timeline, quiet
from octavo.host.worker import build_rank
from octavo.protocol.generate import SamplingParams
from octavo.protocol.plan import PageWrite, SlotInit, StepPlan
from octavo.runner.runner import TorchRunner


@dataclass
class Row:
    """One figure: ``floor_ms`` is the larger of bytes over copy bandwidth and operations over matmul rate, on one of the
    devices; ``sums_ms`` is what its sums over the devices take when nothing else runs."""

    name: str
    ms: float
    tokens_per_s: float
    floor_ms: float
    share: float
    sums_ms: float = 0.0


def ceilings(device: torch.device) -> tuple[float, float]:
    """(bytes/s of a large copy, counting reads and writes; bf16 FLOP/s of an 8192^3 product on random data)."""
    source = torch.randn(1 << 29, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy_s = timed(partial(target.copy_, source), 10)
    del source, target
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    matmul_s = timed(partial(torch.mm, a, b), 10)
    return 2 * (1 << 30) / copy_s, 2 * 8192**3 / matmul_s


def timed(work: Callable[[], object], repeats: int) -> float:
    """Seconds a call, by device events around ``repeats`` calls after two warm-ups; the median of three rounds."""
    work()
    work()
    rounds = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        torch.cuda.synchronize()
        rounds.append(start.elapsed_time(end) / 1e3 / repeats)
    return float(sorted(rounds)[1])


class Driver:
    """Writes plans for ``rows`` sequences straight into a runner."""

    def __init__(self, runner: TorchRunner, sampling: SamplingParams) -> None:
        self.runner = runner
        self.sampling = sampling
        self.step = 0

    def start(self, rows: int, context: int, room: int) -> None:
        """Give every slot pages for context + room tokens and a known history of ``context`` tokens."""
        admits, writes = [], []
        next_page = 1
        for slot in range(rows):
            admits.append(SlotInit(slot, [1 + slot % 97] * context, context, self.sampling, slot, []))
            for index, group in enumerate(self.runner.layout.groups):
                count = ceil_div(context + room, group.spec.page_size)
                writes.append(PageWrite(index, slot, 0, list(range(next_page, next_page + count))))
                next_page += count
        if next_page > self.runner.num_pages:
            raise ValueError(f"{rows} rows of {context + room} tokens need {next_page} pages")
        empty = StepPlan(0, [], [], [], [], [], admits, writes, [])
        self.runner.builder.build(empty)
        self.runner.slots.admit(admits)
        self.runner.sampler.admit(admits)

    def run(self, rows: int, start: int, count: int, sample: bool = True) -> None:
        """One step: every row computes ``count`` tokens from ``start`` on."""
        self.step += 1
        every = list(range(rows))
        plan = StepPlan(
            self.step, every, [start] * rows, [count] * rows, [0] * rows, [sample] * rows, [], [], []
        )
        self.runner.forward(plan)
        self.runner.sample([])


def decode(runner: TorchRunner, rows: int, context: int, steps: int, sampling: SamplingParams) -> float:
    """Seconds a decode step, host loop included, one step in flight while the next is queued."""
    driver = Driver(runner, sampling)
    driver.start(rows, context, 2 * steps + 8)
    at = context
    for _ in range(4):
        driver.run(rows, at, 1)
        at += 1
    for _ in range(4):
        runner.collect()
    torch.cuda.synchronize()
    began = time.perf_counter()
    driver.run(rows, at, 1)
    for _ in range(steps - 1):
        at += 1
        driver.run(rows, at, 1)
        runner.collect()
    runner.collect()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


def prefill(runner: TorchRunner, rows: int, length: int, repeats: int) -> float:
    """Seconds a step that computes ``length`` prompt tokens in each of ``rows`` rows."""
    driver = Driver(runner, SamplingParams(temperature=0.0))
    driver.start(rows, length, 1)
    driver.run(rows, 0, length)
    runner.collect()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        driver.run(rows, 0, length)
        runner.collect()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="octavo bench gpu", description=__doc__)
    parser.add_argument("--model", default="llama-3.1-8b", help="built-in shape, run with random weights")
    parser.add_argument("--batch", default="1,8,32,64,128,256", help="decode rows, comma separated")
    parser.add_argument("--context", type=int, default=160, help="tokens before the timed decode steps")
    parser.add_argument("--steps", type=int, default=64, help="decode steps timed for each batch")
    parser.add_argument("--prefill", default="512,2048,4096,8192", help="prefill step sizes, comma separated")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", default=None, help="store weights in fewer bits: fp8, int8, int4")
    parser.add_argument("--kv-cache-dtype", default="auto", help="fp8: half the bytes of a bfloat16 cache")
    parser.add_argument("--hf-overrides", default=None, help="values of config.json to replace, as JSON")
    parser.add_argument(
        "--tensor-parallel-size", "-tp", type=int, default=1, help="GPUs that share every layer"
    )
    parser.add_argument(
        "--disable-custom-all-reduce", action="store_true", help="sum over GPUs by NCCL alone"
    )
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    add_rank_arguments(parser)
    return parser.parse_args(argv)


def fp8_ceiling(device: torch.device) -> float:
    """fp8 FLOP/s of an 8192^3 product on random data, one scale for all of it."""
    a, b = (torch.randn(8192, 8192, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    product = partial(torch._scaled_mm, a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    return 2 * 8192**3 / timed(product, 10)


def measure(
    runner: TorchRunner, args: argparse.Namespace, bandwidth: float, flops: dict[torch.dtype, float]
) -> list[Row]:
    """All rows of the table; ``flops`` by type of weight, that of bfloat16 for others."""
    elements = runner.network.matrix_elements()
    idle = runner.network.idle_elements(1)  # a token's work: the experts it visits, of those it does not none
    token_s = sum(
        2 * (count - idle.get(dtype, 0.0)) / flops.get(dtype, flops[torch.bfloat16])
        for dtype, count in elements.items()
    )
    token_bytes = sum(len(g.layers) * g.spec.page_bytes / g.spec.page_size for g in runner.layout.groups)
    sampling = SamplingParams(temperature=args.temperature, top_p=args.top_p, max_tokens=4096)
    rows: list[Row] = []
    for batch in numbers(args.batch):
        seconds = decode(runner, batch, args.context, args.steps, sampling)
        moved = bytes_read(runner, batch) + batch * token_bytes * (args.context + args.steps / 2)
        floor = max(moved / bandwidth, token_s * batch)
        sums = sums_ms(runner, batch)
        rows.append(
            Row(f"decode x{batch}", seconds * 1e3, batch / seconds, floor * 1e3, floor / seconds, sums)
        )
    for size in numbers(args.prefill):
        seconds = prefill(runner, 1, size, 5)
        floor = max(bytes_read(runner, size) / bandwidth, token_s * size)
        sums = sums_ms(runner, size)
        rows.append(Row(f"prefill {size}", seconds * 1e3, size / seconds, floor * 1e3, floor / seconds, sums))
    return rows


def bytes_read(runner: TorchRunner, tokens: int) -> float:
    """Bytes of the weights that a step reads: all but experts that nobody chose, were all as likely to be."""
    idle = runner.network.idle_elements(tokens)
    return runner.network.matrix_bytes() - sum(count * dtype.itemsize for dtype, count in idle.items())


def sums_ms(runner: TorchRunner, tokens: int) -> float:
    """Milliseconds that a step's sums over the devices take: two a layer, [tokens, hidden] each, recorded."""
    network = runner.network
    reduce = network.ranks.reduce
    if reduce is None:
        return 0.0
    hidden, layers = network.spec.embedding.hidden, len(network.spec.layers)
    x = torch.zeros((tokens, hidden), dtype=network.dtype, device=runner.platform.device)
    return sum_seconds(reduce, x, runner.platform) * 2e3 * layers


def numbers(text: str) -> list[int]:
    """Whole numbers from "1,8,32"."""
    return [int(part) for part in text.split(",") if part]


def main(argv: list[str]) -> int:
    """Print the table and write it as JSON where asked."""
    args = parse(argv)
    if not torch.cuda.is_available():
        print("octavo bench gpu needs a CUDA device; none is visible.", file=sys.stderr)
        return 1
    if args.tensor_parallel_size > 1 and args.rank is None:
        return run_ranks("octavo.bench.gpu", argv, args.tensor_parallel_size)
    options = EngineOptions.of(
        model=args.model,
        load_format="dummy",
        device="cuda",
        max_model_len="8192",
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=max([8192, *numbers(args.prefill)]),
        dtype=args.dtype,
        quantization=args.quantization,
        kv_cache_dtype=args.kv_cache_dtype,
        hf_overrides=args.hf_overrides,
        tensor_parallel_size=args.tensor_parallel_size,
        disable_custom_all_reduce=args.disable_custom_all_reduce,
    )
    platform = open_platform("cuda", index=args.rank or 0)
    name = platform.hardware().name
    bandwidth, bf16 = ceilings(platform.device)
    flops = {torch.bfloat16: bf16}
    if args.quantization == "fp8":
        flops[torch.float8_e4m3fn] = fp8_ceiling(platform.device)
    platform.release()
    timeline = Timeline.start()
    if args.rank is None:
        built, cards = host.build_runner(options, host.open_files(options), timeline=timeline), name
    else:
        count = args.tensor_parallel_size
        built, cards = build_rank(
            options, Seat(args.rank, count, args.rank, count, args.meeting, quiet), timeline
        )
    runner = built.runner
    if not isinstance(runner, TorchRunner):
        raise TypeError("bench gpu drives the torch runner")
    rows = measure(runner, args, bandwidth, flops)
    if args.rank:
        leave()  # rank 0 tells for all
    rates = ", ".join(
        f"{str(dtype).split('.')[1]} {rate / 1e12:.0f} TFLOP/s" for dtype, rate in flops.items()
    )
    print(f"{cards}: copy {bandwidth / 1e9:.0f} GB/s, {rates}")
    print("start: " + ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in timeline.phases.items()))
    print("kernels: " + str(built.kernels))
    show(rows)
    if args.output:
        table = {"device": cards, "model": args.model, "rows": [asdict(row) for row in rows]}
        table |= {"copy_bytes_per_s": bandwidth, "bf16_flops": bf16, "start_s": timeline.phases}
        table |= {"tensor_parallel_size": args.tensor_parallel_size, "hf_overrides": args.hf_overrides}
        args.output.write_text(json.dumps(table, indent=1))
    if args.rank is not None:
        leave()
    return 0


def show(rows: list[Row]) -> None:
    """Print the table."""
    print(f"{'step':<16}{'ms':>10}{'tok/s':>12}{'floor ms':>11}{'share':>8}{'sums ms':>10}{'of step':>9}")
    for row in rows:
        part = row.sums_ms / row.ms
        print(
            f"{row.name:<16}{row.ms:>10.3f}{row.tokens_per_s:>12.0f}{row.floor_ms:>11.3f}{row.share:>8.0%}"
            f"{row.sums_ms:>10.3f}{part:>9.0%}"
        )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
