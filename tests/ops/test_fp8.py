"""fp8 weights: the reference body against a plain statement, and the Triton kernels against the reference body."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.device.ops import fp8
from octavo.device.ops.bind import Binder, OpSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def fp8_values() -> list[float]:
    """All finite magnitudes of the format, from its definition: bias 7, subnormals at exponent 0, no infinity."""
    found = [mantissa * 2.0**-9 for mantissa in range(8)]
    for exponent in range(1, 16):
        found += [(1 + mantissa / 8) * 2.0 ** (exponent - 7) for mantissa in range(8)]
    return sorted(found)[:-1]  # the last pattern is NaN


def nearest(value: float, table: list[float]) -> float:
    """The nearest of the table; of two as near, the one with an even last bit, which has an even index."""
    return min(table, key=lambda entry: (abs(entry - abs(value)), table.index(entry) % 2))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12),
    st.sampled_from([1.0, 1e-6, 1e5]),
)
def test_quantized_values_are_the_nearest(values: list[float], factor: float) -> None:
    x = torch.tensor([values], dtype=torch.float32) * factor
    quantized, scale = fp8.quantize_rows(x)
    largest = max(x.abs().max().item(), 1e-12)
    assert scale.item() == np.float32(largest) * np.float32(1 / 448)
    table = fp8_values()
    for value, code in zip((x[0] / scale).tolist(), quantized[0].float().tolist()):
        assert abs(code) == nearest(min(abs(value), 448.0), table)
        assert code == 0 or (code > 0) == (value > 0)


def test_rows_are_independent_and_broken_ones_show() -> None:
    x = draw(4, 32)
    x[1] = 0
    x[2, 5] = float("nan")
    quantized, scale = fp8.quantize_rows(x)
    assert (quantized[1].float() == 0).all() and scale[1] > 0
    assert scale[2].isnan() and not scale[[0, 1, 3]].isnan().any()
    alone, _ = fp8.quantize_rows(x[3:])
    assert torch.equal(alone[0].view(torch.uint8), quantized[3].view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_product_is_that_of_the_dequantized_matrices(dtype: torch.dtype) -> None:
    x, bias = draw(5, 64, dtype=dtype), draw(48, dtype=dtype)
    weight, scale = fp8.quantize_rows(draw(48, 64) / 8)
    tokens, token_scale = fp8.quantize_rows(x)
    plain = (tokens.double() * token_scale.double()[:, None]) @ (weight.double() * scale.double()[:, None]).T
    bound = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(
        fp8.linear_fp8(x, weight, scale, bias).double(), plain + bias.double(), atol=bound, rtol=bound
    )
    assert fp8.linear_fp8(x, weight, scale).dtype == dtype
    assert fp8.linear_fp8(x[:0], weight, scale, bias).shape == (0, 48)


def test_error_against_the_unquantized_product_is_as_documented() -> None:
    """Both sides rounded to 3 bits of mantissa: 0.026 each of the norm, 0.037 together."""
    x, plain = draw(64, 512), draw(96, 512) / 22
    weight, scale = fp8.quantize_rows(plain)
    exact = x @ plain.T
    both = (fp8.linear_fp8(x, weight, scale) - exact).norm() / exact.norm()
    weights_only = (x @ (weight.float() * scale[:, None]).T - exact).norm() / exact.norm()
    assert 0.03 < both < 0.045
    assert 0.02 < weights_only < 0.032


@pytest.mark.parametrize(
    ("device", "capability", "chosen"),
    [
        ("cpu", 0, "reference"),
        ("cuda", 80, "reference"),
        ("cuda", 89, "triton"),
        ("cuda", 90, "triton-hopper"),
    ],
)
def test_binding(device: str, capability: int, chosen: str) -> None:
    pytest.importorskip("triton")
    binder = Binder()
    binder.bind(fp8.LINEAR_FP8, OpSpec(device, "bfloat16", capability))
    assert binder.choices == {"linear_fp8": {chosen: 1}}
