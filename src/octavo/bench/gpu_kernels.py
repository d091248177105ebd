"""Every GPU kernel: checked against its reference body, then timed against the floors of this card.

    python -m octavo.bench.gpu_kernels --json kernels.json

The floors are measured in the same run: bytes over the rate of a large copy, operations over the rate of a large
bfloat16 product. Times are those of calls inside one CUDA graph, over rotating buffers that exceed the L2 cache.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.device.ops.activation import ACT_MUL
from octavo.device.ops.attention import PAGED_ATTENTION
from octavo.device.ops.bind import Binder, Op, OpSpec
from octavo.device.ops.linear import GATED_LINEAR, LINEAR
from octavo.device.ops.norm import ADD_RMS_NORM, RMS_NORM
from octavo.device.ops.rope_store import ROPE_STORE
from octavo.device.ops.sampling import GREEDY, LOGPROBS_OF, PENALIZE, SAMPLE

Call = Callable[[], Any]
ROTATE_BYTES = 256 << 20  # more than any L2 cache
PAGE = 16


@dataclass(frozen=True)
class Shape:
    """The parts of a model that decide what its kernels do."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    qk_norm: bool


SHAPES = (
    Shape("llama-3.1-8b", 4096, 32, 8, 128, 14336, 128256, False),
    Shape("qwen3-0.6b", 1024, 16, 8, 128, 3072, 151936, True),
)


@dataclass(frozen=True)
class Case:
    """One op at one shape: ``make(i)`` builds fresh inputs and returns the call; bytes and flops are the least."""

    op: Op
    model: str
    shape: str
    make: Callable[[int], tuple[Any, ...]]
    num_bytes: float
    flops: float = 0.0


@dataclass
class Row:
    """One line of the table; ``share`` is the floor over the time."""

    kernel: str
    bound: str
    model: str
    shape: str
    us: float
    megabytes: float
    gflops: float
    floor_us: float
    share: float


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random normal values on the GPU."""
    return torch.randn(*shape, device="cuda", dtype=dtype)


def scattered(counts: list[int]) -> tuple[Tensor, int]:
    """(page table, pages in all) for rows of so many entries, pages in random order."""
    pages = [-(-count // PAGE) for count in counts]
    table = torch.zeros(len(counts), max(1, *pages), dtype=torch.int32)
    order, used = torch.randperm(sum(pages)).int(), 0
    for row, count in enumerate(pages):
        table[row, :count] = order[used : used + count]
        used += count
    return table.cuda(), used


def attention_inputs(shape: Shape, rows: list[tuple[int, int]]) -> tuple[Any, ...]:
    """Arguments of ``paged_attention`` for rows of (new tokens, keys), pages in random order."""
    table, pages = scattered([keys for _, keys in rows])
    starts = torch.tensor([0] + [new for new, _ in rows]).cumsum(0).int()
    return (
        normal(int(starts[-1]), shape.heads, shape.head_dim),
        normal(pages, 2, shape.kv_heads, PAGE, shape.head_dim),
        table,
        starts.cuda(),
        torch.tensor([keys for _, keys in rows], dtype=torch.int32).cuda(),
        max(new for new, _ in rows),
        max(keys for _, keys in rows),
        shape.head_dim**-0.5,
    )


def attention_case(shape: Shape, name: str, rows: list[tuple[int, int]]) -> Case:
    """Least bytes: keys and values once, queries and outputs once; least operations: the visible pairs."""
    pairs = sum(new * (keys - new) + new * (new + 1) / 2 for new, keys in rows)
    kv_bytes = sum(keys for _, keys in rows) * 2 * shape.kv_heads * shape.head_dim * 2
    q_bytes = sum(new for new, _ in rows) * shape.heads * shape.head_dim * 2 * 2
    return Case(
        PAGED_ATTENTION,
        shape.name,
        name,
        lambda i: attention_inputs(shape, rows),
        kv_bytes + q_bytes,
        4 * pairs * shape.heads * shape.head_dim,
    )


def attention_cases(shape: Shape) -> list[Case]:
    """Decode batches, whole prompts, and a chunk of prompt among decodes."""
    cases = []
    for batch, context in (
        (1, 512),
        (1, 4096),
        (8, 1024),
        (32, 1024),
        (64, 1024),
        (128, 1024),
        (256, 1024),
        (256, 4096),
    ):
        cases.append(attention_case(shape, f"decode {batch} x {context}", [(1, context)] * batch))
    for tokens in (512, 2048, 8192):
        cases.append(attention_case(shape, f"prefill {tokens}", [(tokens, tokens)]))
    cases.append(attention_case(shape, "prefill 16 x 512", [(512, 512)] * 16))
    cases.append(attention_case(shape, "mixed 2048 + 128 x 1024", [(1, 1024)] * 128 + [(2048, 2048)]))
    return cases


def layer_cases(shape: Shape, tokens: int) -> list[Case]:
    """Norms, activation and rope with store for one number of tokens."""
    t, e, f = tokens, shape.hidden, shape.ffn
    wide = (shape.heads + 2 * shape.kv_heads) * shape.head_dim

    def rope_inputs(i: int) -> tuple[Any, ...]:
        weight = normal(shape.head_dim) if shape.qk_norm else None
        pages = normal(-(-t // PAGE), 2, shape.kv_heads, PAGE, shape.head_dim)
        cos_sin = torch.rand(8192, shape.head_dim, device="cuda")
        positions = torch.arange(t, device="cuda") % 8192
        slots = torch.randperm(pages.shape[0] * PAGE, device="cuda")[:t]
        return normal(t, wide), weight, weight, 1e-6, cos_sin, positions, pages, slots, shape.heads

    name = f"{t} tokens"
    return [
        Case(RMS_NORM, shape.name, name, lambda i: (normal(t, e), normal(e), 1e-6), 4 * t * e),
        Case(
            ADD_RMS_NORM, shape.name, name, lambda i: (normal(t, e), normal(t, e), normal(e), 1e-6), 8 * t * e
        ),
        Case(ACT_MUL, shape.name, name, lambda i: (normal(t, 2 * f), "silu"), 6 * t * f),
        Case(ROPE_STORE, shape.name, name, rope_inputs, 4 * t * wide + 4 * t * shape.head_dim),
    ]


def linear_cases(shape: Shape, tokens: int) -> list[Case]:
    """The four products of a layer and the head."""
    wide = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    sizes = {
        "qkv": (wide, shape.hidden),
        "o": (shape.hidden, shape.heads * shape.head_dim),
        "gate_up": (2 * shape.ffn, shape.hidden),
        "down": (shape.hidden, shape.ffn),
        "head": (shape.vocab, shape.hidden),
    }
    gated = Case(
        GATED_LINEAR,
        shape.name,
        f"{tokens} tokens",
        lambda i: (normal(tokens, shape.hidden), normal(2 * shape.ffn, shape.hidden), "silu"),
        2.0 * (2 * shape.ffn * shape.hidden + tokens * (shape.hidden + shape.ffn)),
        4.0 * tokens * shape.ffn * shape.hidden,
    )
    return [gated] + [
        Case(
            LINEAR,
            shape.name,
            f"{tokens} tokens {name}",
            partial(linear_inputs, tokens, n, k),
            2.0 * (n * k + tokens * (n + k)),
            2.0 * tokens * n * k,
        )
        for name, (n, k) in sizes.items()
    ]


def linear_inputs(tokens: int, n: int, k: int, i: int) -> tuple[Any, ...]:
    """Arguments of ``linear``."""
    return normal(tokens, k), normal(n, k), None


def sampling_columns(rows: int, heat: float, k: int, p: float) -> tuple[Tensor, ...]:
    """The per-row columns of ``sample``."""
    return (
        torch.full((rows,), heat, device="cuda"),
        torch.full((rows,), k, dtype=torch.int32, device="cuda"),
        torch.full((rows,), p, device="cuda"),
        torch.zeros(rows, device="cuda"),
        torch.randint(1 << 60, (rows,), device="cuda"),
        torch.randint(4096, (rows,), device="cuda"),
    )


def draw_inputs(rows: int, vocab: int, options: tuple[float, int, float], i: int) -> tuple[Any, ...]:
    """Arguments of ``sample``: logits of a flat distribution, and one temperature, top_k, top_p for all rows."""
    return normal(rows, vocab), *sampling_columns(rows, *options)


def sampling_cases(shape: Shape, rows: int) -> list[Case]:
    """Greedy, three kinds of draw on nearly flat logits (the hardest: nothing is rare), logprobs, penalties."""
    v = shape.vocab
    name = f"{rows} rows"
    read = 2.0 * rows * v
    draws = {"plain": (1.0, 0, 1.0), "top_p .95": (1.0, 0, 0.95), "top_k 20 top_p .95": (0.7, 20, 0.95)}
    cases = [Case(GREEDY, shape.name, name, lambda i: (normal(rows, v),), read)]
    for kind, options in draws.items():
        cases.append(
            Case(
                SAMPLE,
                shape.name,
                f"{name} {kind}",
                partial(draw_inputs, rows, v, options),
                read,
            )
        )
    tokens = torch.arange(rows)
    cases.append(Case(LOGPROBS_OF, shape.name, name, lambda i: (normal(rows, v), tokens.cuda()), read))

    def penalty_inputs(i: int) -> tuple[Any, ...]:
        counts = torch.randint(3, (rows, v), device="cuda", dtype=torch.int32)
        column = torch.full((rows,), 1.1, device="cuda")
        return normal(rows, v), counts, torch.arange(rows, device="cuda").int(), column, column, column

    cases.append(Case(PENALIZE, shape.name, name, penalty_inputs, 8.0 * rows * v))
    return cases


def all_cases(shape: Shape, quick: bool) -> list[Case]:
    """What is timed for one model."""
    cases = attention_cases(shape)
    for tokens in (1, 64, 256, 8192) if not quick else (1, 256):
        cases += layer_cases(shape, tokens)
    for tokens in (1, 8):
        cases += linear_cases(shape, tokens)
    for rows in (1, 64, 256) if not quick else (64,):
        cases += sampling_cases(shape, rows)
    return cases


def time_us(calls: list[Call], repeats: int) -> float:
    """Median time of one call: all of them, ``repeats`` times over, in one graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    times: list[float] = []
    for _ in range(7):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)))
    return statistics.median(times) * 1000 / (len(calls) * repeats)


def ceilings() -> tuple[float, float]:
    """(bytes a second of a copy, read and written; operations a second of a bfloat16 product), measured now."""
    source, target = normal(2, 1 << 29).unbind(0)
    # A kernel, not a memcpy node: the copy engine is slower than the multiprocessors.
    copy = 4 * source.numel() / (time_us([partial(torch.neg, source, out=target)], 5) * 1e-6)
    a, b = normal(8192, 8192), normal(8192, 8192)
    matmul = 2 * 8192.0**3 / (time_us([partial(torch.mm, a, b)], 5) * 1e-6)
    return copy, matmul


def measure(case: Case, bound: str, function: Callable[..., Any], bandwidth: float, rate: float) -> Row:
    """Time one case over enough input sets to leave the L2 cache."""
    sets = int(max(1, min(32, ROTATE_BYTES // max(1.0, case.num_bytes))))
    inputs = [case.make(i) for i in range(sets)]
    calls: list[Call] = [partial(function, *arguments) for arguments in inputs]
    us = time_us(calls, max(1, 32 // sets) if case.num_bytes < ROTATE_BYTES else 2)
    floor = max(case.num_bytes / bandwidth, case.flops / rate) * 1e6
    return Row(
        case.op.name,
        bound,
        case.model,
        case.shape,
        us,
        case.num_bytes / 1e6,
        case.flops / 1e9,
        floor,
        floor / us,
    )


def time_cases(about: str | None, cases: list[Case]) -> int:
    """What a module that only times kernels does when it is run; the tests in ``tests/gpu`` check them."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    major, minor = torch.cuda.get_device_capability()
    binder, spec = Binder(), OpSpec("cuda", "bfloat16", 10 * major + minor)
    bound = {op.name: binder.bind(op, spec) for op in dict.fromkeys(case.op for case in cases)}
    bandwidth, rate = ceilings()
    rows = []
    for case in cases:
        name = case.op.name
        row = measure(case, binder.explain()[name], bound[name], bandwidth, rate)
        rows.append(asdict(row))
        print(
            f"{row.model:18} {row.shape:26} {row.us:9.1f} us  floor {row.floor_us:9.1f} us  {100 * row.share:5.1f} %"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


def error_of(case: Case, function: Callable[..., Any]) -> float:
    """Relative error against the reference body in float32 on fresh inputs; tokens count the share that differs.

    Buffers that the kernel writes are part of the comparison, and free memory is poisoned first.
    """
    inputs = case.make(0)
    ours = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
    theirs = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    expected = case.op.reference(*theirs)
    for size in (1 << 8, 1 << 14, 1 << 20, 1 << 26):
        torch.full((size,), float("nan"), device="cuda")  # freed at once: the kernel's outputs land here
    actual = function(*ours)
    torch.cuda.synchronize()
    pairs = list(zip(actual, expected)) if isinstance(expected, tuple) else [(actual, expected)]
    pairs += [(a, b) for a, b in zip(ours, theirs) if isinstance(a, Tensor) and a.is_floating_point()]
    worst = 0.0
    for a, b in pairs:
        if a is None:
            continue
        if not b.is_floating_point():
            worst = max(worst, (a != b).float().mean().item())
        else:
            ratio = ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()
            worst = max(worst, float("inf") if math.isnan(ratio) else ratio)
    return worst


def check(cases: list[Case], bind: Callable[[Op], tuple[str, Callable[..., Any]]]) -> list[str]:
    """Names of the cases whose error is not that of bfloat16; each is printed."""
    bad = []
    for case in cases:
        error = error_of(case, bind(case.op)[1])
        bound = 0.02 if case.op is SAMPLE else 0.01
        if error > bound:
            bad.append(f"{case.op.name} {case.model} {case.shape}")
            print(f"WRONG {bad[-1]}: error {error:.4f}", flush=True)
    print(f"correct: {len(cases) - len(bad)} of {len(cases)} cases", flush=True)
    return bad


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 1 where a kernel is wrong, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="gpu_kernels", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--portable", action="store_true", help="bind the kernels of older GPUs")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("There is no CUDA device here; run this on a machine with an NVIDIA GPU.", file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability()
    capability = 80 if arguments.portable else 10 * major + minor
    spec = OpSpec("cuda", "bfloat16", capability)

    def bind(op: Op) -> tuple[str, Callable[..., Any]]:
        binder = Binder()
        function = binder.bind(op, spec)
        return next(iter(binder.choices[op.name])), function

    torch.manual_seed(0)
    cases = [case for shape in SHAPES for case in all_cases(shape, arguments.quick)]
    bad = check([case for case in cases if case.num_bytes < 1 << 30], bind)
    bandwidth, rate = ceilings()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e9:.0f} GB/s, bf16 {rate / 1e12:.0f} TFLOP/s")
    rows = []
    for case in cases:
        rows.append(measure(case, *bind(case.op), bandwidth, rate))
        row = rows[-1]
        print(
            f"{row.kernel:16} {row.bound:14} {row.model:13} {row.shape:28} {row.us:9.1f} us {row.megabytes:9.1f} MB "
            f"{row.gflops:8.1f} GF  {100 * row.share:5.1f} % of the floor",
            flush=True,
        )
    if arguments.json:
        table = {"device": torch.cuda.get_device_name(), "copy": bandwidth, "matmul": rate}
        arguments.json.write_text(
            json.dumps({**table, "rows": [asdict(row) for row in rows], "wrong": bad}, indent=1)
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
