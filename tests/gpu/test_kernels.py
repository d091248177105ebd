"""The bound kernels on a real GPU: right at model shapes, the same in a graph, no compile once warm."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.bench import gpu_kernels as bench
from octavo.device.ops import sampling as ops
from octavo.device.ops.attention import PAGED_ATTENTION
from octavo.device.ops.bind import Binder, Op, OpSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


def bind(op: Op) -> Callable[..., Any]:
    major, minor = torch.cuda.get_device_capability()
    binder = Binder()
    function = binder.bind(op, OpSpec("cuda", "bfloat16", 10 * major + minor))
    assert "reference" not in binder.choices[op.name]
    return function


@pytest.mark.alone
@pytest.mark.parametrize("shape", bench.SHAPES, ids=lambda shape: shape.name)
def test_every_kernel_at_model_shapes(shape: bench.Shape) -> None:
    cases = [case for case in bench.all_cases(shape, quick=True) if case.num_bytes < 1 << 28]
    assert len(cases) >= 30
    assert bench.check(cases, lambda op: ("", bind(op))) == []


@pytest.mark.parametrize("batch", [1, 3, 32, 70])
def test_decode_in_a_graph_follows_the_lengths(batch: int) -> None:
    """One capture with the model's bounds serves any lengths: metadata is read on the device."""
    generator = random.Random(batch)
    rows = [(1, generator.randint(1, 1000)) for _ in range(batch)]
    q, pages, table, starts, lens, _, _, scale = bench.attention_inputs(bench.SHAPES[0], rows)
    attend = bind(PAGED_ATTENTION)
    attend(q, pages, table, starts, lens, 1, 8192, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, pages, table, starts, lens, 1, 8192, scale)
    for cut in (0, 1, 17):
        shorter = torch.tensor([max(1, keys - cut * 3) for _, keys in rows], dtype=torch.int32, device="cuda")
        lens.copy_(shorter)
        for _ in range(3):  # counters of the splits are clean again after each replay
            out.fill_(float("nan"))
            graph.replay()
        expected = PAGED_ATTENTION.reference(q.float(), pages.float(), table, starts, lens, 1, 8192, scale)
        torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=0.02)


def test_a_row_alone_equals_the_row_in_a_batch() -> None:
    rows = [(1, 100 + 13 * i) for i in range(64)]
    q, pages, table, starts, lens, _, _, scale = bench.attention_inputs(bench.SHAPES[1], rows)
    attend = bind(PAGED_ATTENTION)
    together = attend(q, pages, table, starts, lens, 1, 2048, scale)
    for i in (0, 31, 63):
        alone = attend(q[i : i + 1], pages, table[i : i + 1], starts[:2], lens[i : i + 1], 1, 2048, scale)
        torch.testing.assert_close(alone[0], together[i], atol=4e-3, rtol=1e-2)


def test_draws_do_not_depend_on_the_batch_or_the_device() -> None:
    vocab = 128256
    logits = torch.randn(32, vocab, device="cuda") * 2
    columns = bench.sampling_columns(32, 0.8, 0, 0.9)
    draw = bind(ops.SAMPLE)
    together = draw(logits, *columns)
    for i in (0, 7, 31):
        alone = draw(logits[i : i + 1], *(column[i : i + 1] for column in columns))
        assert alone.item() == together[i].item()
    on_cpu = ops.sample(logits[:4].cpu(), *(column[:4].cpu() for column in columns))
    assert (on_cpu == together[:4].cpu()).sum() >= 3  # a near tie may fall either way


def test_nothing_compiles_once_warm(compiled: list[str]) -> None:
    """Any number of rows and tokens after one step of each class: single-token, small and long prompts."""
    shape = bench.SHAPES[1]
    attend, greedy, draw = bind(PAGED_ATTENTION), bind(ops.GREEDY), bind(ops.SAMPLE)

    def step(rows: list[tuple[int, int]]) -> Tensor:
        q, pages, table, starts, lens, longest, _, scale = bench.attention_inputs(shape, rows)
        count = len(rows)
        # The packed upload of a step puts its columns at any multiple of four bytes.
        packed = torch.cat((torch.zeros(count % 4, dtype=torch.int32, device="cuda"), starts, lens))
        starts, lens = packed[count % 4 :][: count + 1], packed[count % 4 :][count + 1 :]
        logits = torch.randn(count, 5000, device="cuda")
        greedy(logits)
        draw(logits, *bench.sampling_columns(count, 1.0, 5, 0.9))
        return attend(q, pages, table, starts, lens, longest, 8192, scale)

    for batch in (1, 2, 4, 8, 16, 32, 33, 64, 70):
        step([(1, 50)] * batch)
    step([(7, 7)])
    for singles in (1, 2):
        step([(5000, 5000), *[(1, 50)] * singles])
    warm = len(compiled)
    assert warm > 5
    generator = random.Random(0)
    for _ in range(40):
        kind = generator.choice((1, 1, 30, 6000))
        rows = [
            (new := generator.randint(1, kind), new + generator.randint(0, 90))
            for _ in range(generator.randint(1, 70))
        ]
        if kind == 6000:
            rows = [*rows[:2], (4500, 4600)]
        step(rows)
    assert compiled[warm:] == []
