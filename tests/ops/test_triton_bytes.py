"""Products of bytes in Triton (by the interpreter where there is no GPU) against their reference bodies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.device.ops import fp8, int8

pytest.importorskip("triton")
from octavo.device.kernels.triton import bytes as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOUND = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


@pytest.fixture(autouse=True)
def few_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "BLOCKS", (16, 32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_rows_are_equal_to_the_bit(dtype: torch.dtype) -> None:
    x = draw(4, 600, dtype=dtype) * torch.tensor([[1e-4], [1.0], [0.0], [5.0]]).to(DEVICE, dtype)
    expected, actual = int8.quantize_rows_int8(x), kernels.quantize_rows_int8(x)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8(dtype: torch.dtype, tokens: int) -> None:
    weight, scale = int8.quantize_rows_int8(draw(40, 320) / 320**0.5)
    x, bias = draw(tokens, 320, dtype=dtype), draw(40, dtype=dtype)
    linear = kernels.LinearInt8()
    for shift in (None, bias):
        expected = int8.linear_int8(x, weight, scale, shift)
        torch.testing.assert_close(
            linear(x, weight, scale, shift), expected, atol=BOUND[dtype], rtol=BOUND[dtype]
        )
    assert linear.counters is not None and not linear.counters.any()
    assert linear(x[:0], weight, scale).shape == (0, 40)


def block_scaled(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    matrix = draw(outputs, inputs) / inputs**0.5
    values, scale = fp8.quantize_rows(matrix.reshape(-1, 128))
    return values.view(outputs, inputs), scale.view(outputs, -1).t().contiguous()


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_blocks(dtype: torch.dtype, tokens: int) -> None:
    weight, scale = block_scaled(40, 384)
    x, bias = draw(tokens, 384, dtype=dtype), draw(40, dtype=dtype)
    linear = kernels.LinearFp8Block()
    for shift in (None, bias):
        expected = fp8.linear_fp8_block(x, weight, scale, shift)
        torch.testing.assert_close(
            linear(x, weight, scale, shift), expected, atol=BOUND[dtype] * 2, rtol=BOUND[dtype]
        )


def test_block_reference_is_near_the_plain_product() -> None:
    """A scale for 128 inputs: the error of two roundings to three bits of mantissa."""
    weight, scale = block_scaled(40, 384)
    x = draw(20, 384)
    exact = x @ (weight.float() * scale.t().repeat_interleave(128, 1)).t()
    error = (fp8.linear_fp8_block(x, weight, scale) - exact).norm() / exact.norm()
    assert 0.005 < error < 0.04
