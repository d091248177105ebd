"""Experts over packed codes: the reference against dense experts, the Triton kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from packed_cases import DEVICE, LAYOUTS, draw, normal
from torch import Tensor

from octavo.device.ops import moe
from octavo.device.ops.packed import unpack

EXPERTS, HIDDEN, INNER, TOP_K = 5, 160, 48, 2


def case(name: str, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Arguments up to the matrices; no token visits expert 3."""
    generator = torch.Generator().manual_seed(tokens)
    gate_up = draw(LAYOUTS[name], EXPERTS * 2 * INNER, HIDDEN, seed=1)
    down = draw(LAYOUTS[name], EXPERTS * HIDDEN, INNER, seed=2)
    ids = torch.stack([torch.randperm(4, generator=generator)[:TOP_K] for _ in range(tokens)])
    ids = torch.where(ids == 3, 4, ids).to(DEVICE)
    weights = torch.rand(tokens, TOP_K, generator=generator).to(DEVICE)
    return normal(tokens, HIDDEN, dtype=dtype), ids, weights, gate_up, down  # type: ignore[return-value]


def biases(gate_up: object, down: object, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    outputs, hidden = gate_up.outputs, gate_up.inputs  # type: ignore[attr-defined]
    return normal(EXPERTS, outputs // EXPERTS, dtype=dtype), normal(EXPERTS, hidden, dtype=dtype)


@pytest.mark.parametrize("name", ["awq", "mxfp4", "q4_k", "fp8"])
def test_reference_is_that_of_dense_experts(name: str) -> None:
    x, ids, weights, gate_up, down = case(name, 9)
    hidden = gate_up.inputs  # type: ignore[attr-defined]
    dense = unpack(gate_up).view(EXPERTS, -1, hidden), unpack(down).view(EXPERTS, hidden, -1)  # type: ignore[arg-type]
    shifts = biases(gate_up, down, torch.float32)
    for bias in ((None, None), shifts):
        expected = moe.experts(x, ids, weights, *dense, "silu", 1.0, 0.0, *bias)
        actual = moe.experts_packed(x, ids, weights, gate_up, down, "silu", 1.0, 0.0, *bias)  # type: ignore[arg-type]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    ids[0], ids[1, 0] = EXPERTS, EXPERTS  # not here
    expected = moe.experts(x, ids, weights, *dense, "silu", partial=True)
    actual = moe.experts_packed(x, ids, weights, gate_up, down, "silu", partial=True)  # type: ignore[arg-type]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


pytest.importorskip("triton")
from octavo.device.kernels.triton import moe as moe_kernels
from octavo.device.kernels.triton import moe_packed as kernels


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("awq", 3), ("awq", 40), ("mxfp4", 40), ("q3_k", 3), ("q6_k", 40), ("fp8", 3), ("fp8-channel", 40)],
)
def test_kernel(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens in the skinny form, more in tiles; biases, clamped activation, experts that are elsewhere."""
    block = 16 if tokens < 16 else 32
    monkeypatch.setattr(moe_kernels, "block_rows", lambda count, num: block)
    compute = kernels.GroupedPackedExperts((block,))
    compute.ready = DEVICE == "cpu"  # the interpreter has nothing to compile
    dtype = torch.float16
    x, ids, weights, gate_up, down = case(name, tokens, dtype)
    bias = biases(gate_up, down, dtype)
    activation = ("swiglu_clamped", 1.7, 7.0) if name == "mxfp4" else ("silu", 1.0, 0.0)
    expected = moe.experts_packed(x, ids, weights, gate_up, down, *activation, *bias)  # type: ignore[arg-type]
    actual = compute(x, ids, weights, gate_up, down, *activation, *bias)
    torch.testing.assert_close(actual, expected, atol=4e-3, rtol=4e-3)
    ids[0] = EXPERTS
    expected = moe.experts_packed(x, ids, weights, gate_up, down, *activation, partial=True)  # type: ignore[arg-type]
    actual = compute(x, ids, weights, gate_up, down, *activation, partial=True)
    torch.testing.assert_close(actual, expected, atol=4e-3, rtol=4e-3)
    assert not actual[0].any()
