"""Experts and routing: the Triton kernels against the reference bodies, the reference bodies against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.device.ops import moe

pytest.importorskip("triton")
from octavo.device.kernels.triton import moe as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def slow(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """Token by token, choice by choice."""
    out = torch.zeros_like(x)
    for token in range(ids.shape[0]):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist()):
            inner = moe.gated((gate_up[expert] @ x[token]).unsqueeze(0), activation)
            out[token] += weight * (down[expert] @ inner[0])
    return out


def test_reference_is_the_plain_sum() -> None:
    ids, weights = moe.route(draw(7, 6), 3)
    args = (draw(7, 32), ids, weights, draw(6, 48, 32, scale=0.2), draw(6, 32, 24, scale=0.2))
    torch.testing.assert_close(moe.experts(*args, "silu"), slow(*args, "silu"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(
                DEVICE == "cpu", reason="the interpreter multiplies bfloat16 as integers"
            ),
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("tokens", "num", "top_k", "hidden", "inner"),
    [(1, 4, 2, 64, 32), (5, 8, 3, 96, 40), (70, 4, 2, 64, 64), (12, 130, 4, 32, 16)],
)
def test_experts(dtype: torch.dtype, tokens: int, num: int, top_k: int, hidden: int, inner: int) -> None:
    ids, weights = moe.route(draw(tokens, num), top_k)
    x = draw(tokens, hidden, dtype=dtype)
    gate_up, down = (
        draw(num, 2 * inner, hidden, dtype=dtype, scale=hidden**-0.5),
        draw(num, hidden, inner, dtype=dtype, scale=inner**-0.5),
    )
    compute = kernels.GroupedExperts()
    compute.ready = DEVICE == "cpu" and tokens > 1  # one token goes through every block size
    ours = compute(x, ids, weights, gate_up, down, "silu")
    theirs = moe.experts(x.float(), ids, weights, gate_up.float(), down.float(), "silu")
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), theirs, atol=BOUND[dtype], rtol=BOUND[dtype])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu", "swiglu_clamped"])
def test_biases_and_activations(activation: str) -> None:
    ids, weights = moe.route(draw(9, 5), 2, scoring="softmax_top_k")
    args = (
        draw(9, 32) * 3,
        ids,
        weights,
        draw(5, 48, 32),
        draw(5, 32, 24),
        activation,
        1.7,
        2.0,
        draw(5, 48),
        draw(5, 32),
    )
    torch.testing.assert_close(kernels.GroupedExperts()(*args), moe.experts(*args), atol=2e-3, rtol=1e-4)


@given(
    st.integers(1, 40), st.integers(1, 20), st.integers(1, 4), st.sampled_from([16, 32]), st.integers(0, 9)
)
@settings(max_examples=15, deadline=None)
def test_sort_lists_every_choice_once_in_its_expert(
    tokens: int, num: int, top_k: int, block: int, seed: int
) -> None:
    ids = torch.randint(0, num, (tokens, top_k), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    rows, owner, used = (part.cpu() for part in kernels.sorted_rows(ids, num, block))
    flat, blocks = ids.flatten().cpu(), rows[: int(used) * block].view(-1, block)
    real = blocks < flat.numel()
    assert sorted(blocks[real].tolist()) == list(range(flat.numel()))
    for mine, valid, expert in zip(blocks, real, owner):
        assert valid.any() and (flat[mine[valid].long()] == expert).all()
    assert int(used) <= owner.numel()


ROUTES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "unnormalized": {"renormalize": False, "scale": 2.5},
    "top_k": {"scoring": "softmax_top_k"},
    "sigmoid": {"scoring": "sigmoid", "correction": True},
    "root": {"scoring": "sqrt_softplus", "correction": True, "scale": 1.5},
    "groups": {"scoring": "sigmoid", "groups": 4, "top_groups": 2, "correction": True},
    "groups of one": {"groups": 24, "top_groups": 5},
    "best of a group": {"renormalize": False, "scale": 16.0, "groups": 4, "top_groups": 2, "group_best": 1},
}


@pytest.mark.parametrize("options", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_route_kernel(options: dict[str, Any], dtype: torch.dtype) -> None:
    # Distinct in bfloat16 too: equal scores may be chosen in any order.
    order = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(i)) for i in range(9)])
    logits = ((order - 11.5) / 8).to(DEVICE, dtype)
    given = dict(options)
    if given.pop("correction", False):
        given["correction"] = draw(24)
    ids, weights = kernels.route(logits, 5, **given)
    expected_ids, expected = moe.route(logits, 5, **given)
    assert ids.dtype == expected_ids.dtype and weights.dtype == expected.dtype
    assert torch.equal(ids.sort(-1).values, expected_ids.sort(-1).values)
    torch.testing.assert_close(weights.sort(-1).values, expected.sort(-1).values, atol=1e-6, rtol=1e-5)
    assert torch.equal(ids.gather(1, weights.argsort(-1)), expected_ids.gather(1, expected.argsort(-1)))


def test_routing() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    ids, weights = moe.route(logits, 2, renormalize=False)
    assert ids.tolist() == [[1, 3]]
    torch.testing.assert_close(weights, torch.softmax(logits, -1)[:, [1, 3]])
    chosen = moe.route(logits, 2, scoring="softmax_top_k")[1]
    torch.testing.assert_close(chosen, moe.route(logits, 2)[1])  # the same, by two ways
    assert moe.route(logits, 2, scale=2.5)[1].sum().item() == pytest.approx(2.5)
    # Groups {0, 1} and {2, 3}: alone, expert 1 is best, but the second group has the better pair.
    grouped = moe.route(logits, 1, scoring="sigmoid", groups=2, top_groups=1)[0]
    assert grouped.tolist() == [[3]]
    assert moe.route(logits, 1, groups=2, top_groups=1, group_best=1)[0].tolist() == [[1]]
    corrected, weights = moe.route(
        logits, 1, scoring="sigmoid", renormalize=False, correction=torch.tensor([9.0, 0, 0, 0])
    )
    assert corrected.tolist() == [[0]] and weights.item() == pytest.approx(0.5)  # chosen by it, not weighed


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no CUDA device here")
@pytest.mark.parametrize("tokens", [1, 64, 700])
def test_a_captured_graph_follows_the_router(tokens: int) -> None:
    """One capture serves whatever experts are chosen: nothing is decided on the host."""
    num, top_k, hidden, inner = 32, 4, 256, 128
    gate_up = draw(num, 2 * inner, hidden, dtype=torch.bfloat16, scale=hidden**-0.5)
    down = draw(num, hidden, inner, dtype=torch.bfloat16, scale=inner**-0.5)
    x, logits = draw(tokens, hidden, dtype=torch.bfloat16), draw(tokens, num)
    experts = kernels.GroupedExperts()
    experts(x, *kernels.route(logits, top_k), gate_up, down, "silu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(x, *kernels.route(logits, top_k), gate_up, down, "silu")
    for bias in (0.0, 30.0):  # spread, then all tokens on the same experts
        logits.normal_()
        logits[:, :top_k] += bias
        graph.replay()
        expected = moe.experts(x.float(), *moe.route(logits, top_k), gate_up.float(), down.float(), "silu")
        torch.testing.assert_close(out.float(), expected, atol=3e-2, rtol=3e-2)
