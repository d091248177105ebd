"""The other reference ops against arithmetic written out: norms, rotation and store, gated activations."""

from __future__ import annotations

import math

import pytest
import torch

from octavo.device.ops.activation import act_mul
from octavo.device.ops.norm import add_rms_norm, rms_norm
from octavo.device.ops.rope_store import rope_store

HEADS, KV_HEADS, DIM, PAGE = 4, 2, 8, 4


def test_rms_norm_and_its_fused_addition() -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(5, 12), torch.randn(5, 12), torch.randn(12)
    total = x + residual
    want = torch.stack([row / math.sqrt(float((row * row).mean()) + 1e-5) * weight for row in total])
    before = x.clone()
    torch.testing.assert_close(add_rms_norm(x, residual, weight, 1e-5), want)
    torch.testing.assert_close(residual, total)
    assert torch.equal(x, before)
    torch.testing.assert_close(rms_norm(total, weight, 1e-5), want)


def test_rms_norm_of_half_values_is_computed_in_float32() -> None:
    x = torch.full((1, 64), 3e4, dtype=torch.float16)  # squares overflow float16
    out = rms_norm(x, torch.ones(64), 1e-6)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, torch.ones(1, 64, dtype=torch.float16))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_act_mul(activation: str) -> None:
    gate, up = [-3.0, -0.5, 0.0, 0.7, 4.0], [2.0, -1.0, 5.0, 0.3, 1.0]
    formulas = {
        "silu": lambda g: g / (1 + math.exp(-g)),
        "gelu": lambda g: g * (1 + math.erf(g / math.sqrt(2))) / 2,
        "gelu_tanh": lambda g: g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) / 2,
    }
    want = [formulas[activation](g) * u for g, u in zip(gate, up)]
    got = act_mul(torch.tensor([gate + up]), activation)
    torch.testing.assert_close(got, torch.tensor([want]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dim", [DIM, 4, 0])
@pytest.mark.parametrize("norm", [False, True])
def test_rope_store(dim: int, norm: bool) -> None:
    """Each pair (i, i + dim/2) of q and k turns by position * frequency; v is stored untouched; slot -1 is skipped."""
    torch.manual_seed(1)
    qkv = torch.randn(5, (HEADS + 2 * KV_HEADS) * DIM)
    positions = torch.tensor([0, 3, 7, 2, 1])
    slots = torch.tensor([2 * PAGE + 1, -1, 0, 1 * PAGE + 3, 3])
    frequencies = torch.tensor([10.0 ** (-i) for i in range(dim // 2)])
    angles = torch.outer(torch.arange(8.0), frequencies)
    table = torch.cat((angles.cos(), angles.sin()), 1) if dim else None
    weights = (torch.rand(DIM) + 0.5, torch.rand(DIM) + 0.5) if norm else (None, None)
    pages = torch.full((3, 2, KV_HEADS, PAGE, DIM), 9.0)
    q = rope_store(qkv, *weights, 1e-6, table, positions, pages, slots, HEADS)

    heads = qkv.view(5, HEADS + 2 * KV_HEADS, DIM)
    untouched = torch.ones(3, PAGE, dtype=torch.bool)
    for t in range(5):
        for h in range(HEADS + KV_HEADS):
            want = heads[t, h].clone()
            weight = weights[0] if h < HEADS else weights[1]
            if weight is not None:
                want = want / math.sqrt(float((want * want).mean()) + 1e-6) * weight
            turned = want.clone()
            for i in range(dim // 2):
                angle = float(positions[t] * frequencies[i])
                a, b = want[i], want[i + dim // 2]
                turned[i] = a * math.cos(angle) - b * math.sin(angle)
                turned[i + dim // 2] = b * math.cos(angle) + a * math.sin(angle)
            if h < HEADS:
                torch.testing.assert_close(q[t, h], turned, atol=1e-5, rtol=1e-5)
            elif slots[t] >= 0:
                page, offset = divmod(int(slots[t]), PAGE)
                untouched[page, offset] = False
                torch.testing.assert_close(pages[page, 0, h - HEADS, offset], turned, atol=1e-5, rtol=1e-5)
                assert torch.equal(pages[page, 1, h - HEADS, offset], heads[t, h + KV_HEADS])
    assert (pages.permute(0, 3, 1, 2, 4)[untouched] == 9.0).all()
    assert int(untouched.sum()) == 12 - 4
