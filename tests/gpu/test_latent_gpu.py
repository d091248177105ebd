"""Latent attention on a real GPU: right at model shapes in bfloat16, the same in a graph, no compile once warm."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from octavo.bench import gpu_latent as bench
from octavo.device.ops.bind import Binder, Op, OpSpec
from octavo.device.ops.latent import LATENT_ATTENTION, LATENT_PREFILL
from octavo.device.ops.sparse import INDEX_CHOOSE, INDEX_SCORES, SPARSE_ATTENTION

pytestmark = pytest.mark.gpu


def bind(op: Op) -> Any:
    major, minor = torch.cuda.get_device_capability()
    binder = Binder()
    function = binder.bind(op, OpSpec("cuda", "bfloat16", 10 * major + minor))
    assert "reference" not in binder.choices[op.name]
    return function


@pytest.mark.parametrize("shape", bench.SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize(
    "rows",
    [
        [(1, 1)],
        [(1, 3000)],
        [(1, 17 + 29 * i) for i in range(40)],
        [(5, 5), (1, 700), (130, 1000), (0, 3), (64, 64)],
    ],
    ids=["first", "long", "batch", "mixed"],
)
def test_attention_at_model_shapes(shape: bench.Shape, rows: list[tuple[int, int]]) -> None:
    inputs = bench.attention_inputs(shape, rows)
    ours = bind(LATENT_ATTENTION)(*inputs)
    theirs = LATENT_ATTENTION.reference(*inputs)
    torch.testing.assert_close(ours.float(), theirs.float(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("shape", bench.SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("rows", [[(200, 200)], [(33, 900), (2, 2), (300, 301)]], ids=["prompt", "chunks"])
def test_prefill_at_model_shapes(shape: bench.Shape, rows: list[tuple[int, int]]) -> None:
    out, *inputs = bench.prefill_inputs(shape, rows)
    bind(LATENT_PREFILL)(out, *inputs)
    theirs = torch.empty_like(out)
    LATENT_PREFILL.reference(theirs, *inputs)
    torch.testing.assert_close(out.float(), theirs.float(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("batch", [1, 3, 70])
def test_decode_in_a_graph_follows_the_lengths(batch: int) -> None:
    generator = random.Random(batch)
    rows = [(1, generator.randint(1, 900)) for _ in range(batch)]
    inputs = bench.attention_inputs(bench.SHAPES[0], rows)
    attend, lens = bind(LATENT_ATTENTION), inputs[4]
    attend(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(*inputs)
    for cut in (0, 1, 50):
        lens.copy_(torch.tensor([max(1, keys - cut * 3) for _, keys in rows], dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        theirs = LATENT_ATTENTION.reference(*inputs)
        torch.testing.assert_close(out.float(), theirs.float(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("rows", [[(1, 3000)], [(1, 100), (40, 2500), (3, 3)]], ids=["decode", "mixed"])
def test_indexer_and_chosen_keys_at_model_shapes(rows: list[tuple[int, int]]) -> None:
    """DeepSeek V3.2: 64 index heads of 128, the best 2048 keys for 128 heads."""
    wide, pages, table, _, lens, *_, scale, latent = bench.attention_inputs(bench.SHAPES[0], rows)
    tokens, keys = wide.shape[0], int(lens.max())
    q, weights = bench.normal(tokens, 64, 128), torch.randn(tokens, 64, device="cuda") / 100
    index_pages = bench.normal(pages.shape[0], pages.shape[1], 128)
    row = [i for i, (new, _) in enumerate(rows) for _ in range(new)]
    seen = [length - new + 1 + i for new, length in rows for i in range(new)]
    row, seen = (torch.tensor(found, dtype=torch.int32, device="cuda") for found in (row, seen))
    common = (q, weights, index_pages, table, row, seen, keys, 0, tokens)
    scores = bind(INDEX_SCORES)(*common)
    there = torch.arange(keys, device="cuda") < seen.unsqueeze(1)
    torch.testing.assert_close(scores[there], INDEX_SCORES.reference(*common)[there], atol=2e-2, rtol=2e-2)
    choice = (scores, table, row, seen, bench.PAGE, 2048, 0)
    chosen = bind(INDEX_CHOOSE)(*choice)
    assert torch.equal(chosen.sort().values, INDEX_CHOOSE.reference(*choice).sort().values)
    ours = bind(SPARSE_ATTENTION)(wide, pages, chosen, seen, scale, latent)
    theirs = SPARSE_ATTENTION.reference(wide, pages, chosen, seen, scale, latent)
    torch.testing.assert_close(ours.float(), theirs.float(), atol=2e-2, rtol=2e-2)
