"""The Triton kernels of a layer outside attention, against their reference bodies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.device.ops import activation, linear, norm, rope_store

pytest.importorskip("triton")
from octavo.device.kernels.triton import activation as activation_kernels
from octavo.device.kernels.triton import linear as linear_kernels
from octavo.device.kernels.triton import norm as norm_kernels
from octavo.device.kernels.triton import rope_store as rope_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}  # two units in the last place


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    bound = BOUND[expected.dtype]
    torch.testing.assert_close(actual.float(), expected.float(), atol=bound, rtol=bound)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 576, 1024])
def test_norms(dtype: torch.dtype, size: int) -> None:
    x, residual, weight = draw(5, size, dtype=dtype), draw(5, size, dtype=dtype) * 3, draw(size, dtype=dtype)
    close(norm_kernels.rms_norm(x, weight, 1e-5), norm.rms_norm(x, weight, 1e-5))
    close(
        norm_kernels.rms_norm(x.view(5, 1, size), weight, 1e-5),
        norm.rms_norm(x.view(5, 1, size), weight, 1e-5),
    )
    close(norm_kernels.rms_norm(x[:, :48], weight[:48], 1e-5), norm.rms_norm(x[:, :48], weight[:48], 1e-5))
    ours, theirs = residual.clone(), residual.clone()
    close(norm_kernels.add_rms_norm(x, ours, weight, 1e-6), norm.add_rms_norm(x, theirs, weight, 1e-6))
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        close(ours, theirs)  # the interpreter truncates to bfloat16
    else:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu_tanh", "gelu"])
def test_act_mul(dtype: torch.dtype, name: str) -> None:
    for size in (96, 1500):
        gate_up = draw(3, 2 * size, dtype=dtype) * 4
        gate_up[0, 0], gate_up[1, 1] = 60.0, -60.0
        for limit in (0.0, 2.5):
            ours = activation_kernels.act_mul(gate_up, name, limit)
            close(ours, activation.act_mul(gate_up, name, limit))
        assert ours.abs().max() <= 2.5 * 2.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [4, 70])
@pytest.mark.parametrize("case", ["plain", "normed", "partial", "no rope", "no rope, normed"])
def test_rope_store(dtype: torch.dtype, tokens: int, case: str) -> None:
    heads, kv_heads, dim, page = 3, 1, 48 if case == "partial" else 32, 16
    rotary = 32
    qkv = draw(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    weights = (draw(dim, dtype=dtype), draw(dim, dtype=dtype) + 2) if "normed" in case else (None, None)
    angles = torch.rand(100, rotary // 2, generator=torch.Generator().manual_seed(1), device="cpu") * 6
    cos_sin = None if "no rope" in case else torch.cat((angles.cos(), angles.sin()), dim=1).to(DEVICE)
    positions = (torch.arange(tokens, device=DEVICE) * 7) % 100
    slots = torch.randperm(8 * page, generator=torch.Generator().manual_seed(2))[:tokens].to(DEVICE)
    slots[1] = -1
    pages = torch.full((8, 2, kv_heads, page, dim), 7.0, dtype=dtype, device=DEVICE)
    ours, theirs = pages.clone(), pages.clone()
    expected = rope_store.rope_store(qkv, *weights, 1e-6, cos_sin, positions, theirs, slots, heads)
    close(rope_kernels.rope_store(qkv, *weights, 1e-6, cos_sin, positions, ours, slots, heads), expected)
    close(ours, theirs)
    written = (theirs != 7.0).any(-1).sum().item()
    assert written == 2 * (tokens - 1) * kv_heads


def test_rope_store_into_a_view_of_the_pool() -> None:
    """Pages of one group are a slice of a larger buffer; neighbours stay untouched."""
    pool = torch.full((4, 3, 2, 2, 16, 32), 7.0, device=DEVICE)
    qkv = draw(2, (2 + 4) * 32)
    slots = torch.tensor([5, 33], device=DEVICE)
    positions = torch.tensor([0, 1], device=DEVICE)
    rope_kernels.rope_store(qkv, None, None, 1e-6, None, positions, pool[:, 1], slots, 2)
    assert (pool[:, 0] == 7.0).all() and (pool[:, 2] == 7.0).all()
    torch.testing.assert_close(pool[2, 1, 1, :, 1], qkv.view(2, 6, 32)[1, 4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_linear(dtype: torch.dtype, tokens: int) -> None:
    """Nothing, one token, and one more than the kernel takes; sizes that fill no tile."""
    x, weight, bias = draw(tokens, 600, dtype=dtype), draw(70, 600, dtype=dtype) / 24, draw(70, dtype=dtype)
    close(linear_kernels.linear(x, weight, bias), linear.linear(x, weight, bias))
    close(linear_kernels.linear(x, weight), linear.linear(x, weight))


@pytest.mark.parametrize("scaled", [False, True])
def test_rope_store_into_eight_bits(scaled: bool) -> None:
    qkv, cos_sin, positions = draw(5, (4 + 2 * 2) * 16), draw(64, 16), torch.arange(5, device=DEVICE) + 3
    slots = torch.tensor([9, 3, -1, 17, 40], device=DEVICE)
    scales = torch.tensor([[0.25, 0.125], [2.0, 1.0]], device=DEVICE) if scaled else None
    found = []
    for function in (rope_kernels.rope_store, rope_store.rope_store):
        pages = torch.zeros(4, 2, 2, 16, 16, dtype=torch.float8_e4m3fn, device=DEVICE)
        q = function(qkv, None, None, 1e-5, cos_sin, positions, pages, slots, 4, scales)
        found.append((q, pages.float()))
    close(found[0][0], found[1][0])
    # One step of three bits of mantissa where the sum of two products falls between two; the interpreter rounds oddly.
    apart = (found[0][1] - found[1][1]).abs() > 0.126 * found[1][1].abs() + 2**-6
    assert apart.float().mean() <= (0.0 if DEVICE == "cuda" else 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_gated_linear(dtype: torch.dtype, name: str, tokens: int) -> None:
    x, weight = draw(tokens, 600, dtype=dtype), draw(2 * 70, 600, dtype=dtype) / 24
    close(linear_kernels.gated_linear(x, weight, name), linear.gated_linear(x, weight, name))


@pytest.mark.parametrize("shape", [(4, 256), (16, 512), (8, 1024)], ids=str)
def test_every_launch_shape_multiplies_the_same(shape: tuple[int, int]) -> None:
    """What ``octavo.bench.gpu_vector`` may choose from."""
    launch = linear_kernels.Launch(*shape, 4, 2)
    x, weight = draw(1, 600), draw(2 * 70, 600) / 24
    close(linear_kernels.vector(x, weight, None, launch), linear.linear(x, weight))
    close(linear_kernels.gated_vector(x, weight, "silu", launch), linear.gated_linear(x, weight, "silu"))
