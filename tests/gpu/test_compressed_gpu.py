"""Compressed attention on a real GPU: right at DeepSeek V4-Flash's shapes in bfloat16, the same in a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo.bench import gpu_compressed as bench
from octavo.device.ops.bind import Binder, Op, OpSpec
from octavo.device.ops.compressed import COMPRESS, COMPRESSED_ATTENTION, HEAD_STORE, ROTATE_PAIRS
from octavo.device.ops.hyper import HYPER_ENTER, HYPER_LEAVE, HYPER_LOGITS

pytestmark = pytest.mark.gpu
SHAPES = pytest.mark.parametrize("shape", bench.SHAPES, ids=lambda shape: shape.name)


def bind(op: Op) -> Any:
    major, minor = torch.cuda.get_device_capability()
    binder = Binder()
    function = binder.bind(op, OpSpec("cuda", "bfloat16", 10 * major + minor))
    assert "reference" not in binder.choices[op.name]
    return function


def near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours.float(), theirs.float(), atol=2e-2, rtol=2e-2)


@SHAPES
@pytest.mark.parametrize(
    "rows",
    [[(1, 1)], [(1, 9000)], [(1, 17 + 290 * i) for i in range(12)], [(5, 5), (1, 700), (70, 3000)]],
    ids=["first", "long", "batch", "mixed"],
)
def test_attention(shape: bench.Shape, rows: list[tuple[int, int]]) -> None:
    inputs = bench.attention_inputs(shape, rows)
    near(bind(COMPRESSED_ATTENTION)(*inputs), COMPRESSED_ATTENTION.reference(*inputs))


def test_decode_in_a_graph_follows_the_lengths() -> None:
    rows = [(1, 300 + 411 * i) for i in range(5)]
    inputs = bench.attention_inputs(bench.SHAPES[1], rows)
    attend, seen = bind(COMPRESSED_ATTENTION), inputs[9]
    attend(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(*inputs)
    for cut in (0, 1, 50):
        seen.copy_(torch.tensor([length - cut * 3 for _, length in rows], dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        near(out, COMPRESSED_ATTENTION.reference(*inputs))


@SHAPES
def test_entries(shape: bench.Shape) -> None:
    inputs = bench.compress_inputs(shape, [(300, 300), (1, 512), (2, 513)])
    ours, theirs = inputs[9], inputs[9].clone()
    before = ours.clone()
    bind(COMPRESS)(*inputs)
    COMPRESS.reference(*inputs[:9], theirs, inputs[10])
    near(ours, theirs)
    changed = (ours != before).flatten(0, 1).any(-1).sum()
    assert changed == 300 // shape.rate + 2


def test_heads() -> None:
    shape = bench.SHAPES[0]
    q, key = bench.normal(33, shape.heads, shape.head_dim), bench.normal(33, shape.head_dim)
    weight, angles = torch.rand(shape.head_dim, device="cuda"), torch.rand(64, shape.rope, device="cuda")
    positions = torch.arange(33, device="cuda")
    slots = torch.where(positions == 5, -1, positions)
    pages = torch.zeros(2, 3, 16, shape.head_dim, device="cuda", dtype=torch.bfloat16)
    common = (q, key, weight, 1e-6, angles, positions)
    near(bind(HEAD_STORE)(*common, pages[0], slots), HEAD_STORE.reference(*common, pages[1], slots))
    near(pages[0], pages[1])
    near(bind(ROTATE_PAIRS)(q, angles, positions, True), ROTATE_PAIRS.reference(q, angles, positions, True))


@pytest.mark.parametrize("tokens", [1, 200])
def test_hyper_connections(tokens: int) -> None:
    inputs = bench.enter_inputs(bench.SHAPES[0], tokens)
    for ours, theirs in zip(bind(HYPER_ENTER)(*inputs), HYPER_ENTER.reference(*inputs)):
        near(ours, theirs)
    product = bench.logits_inputs(bench.SHAPES[0], tokens)
    torch.testing.assert_close(
        bind(HYPER_LOGITS)(*product), HYPER_LOGITS.reference(*product), atol=1e-3, rtol=1e-3
    )
    streams, answer, weights = bench.leave_inputs(bench.SHAPES[0], tokens)
    apart = streams.clone()
    bind(HYPER_LEAVE)(streams, answer, weights)
    HYPER_LEAVE.reference(apart, answer, weights)
    near(streams, apart)
