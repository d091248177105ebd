"""Products of a few tokens, in Triton (on a CPU by its interpreter), against plain float64 products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.device.ops.fp8 import quantize_rows

pytest.importorskip("triton")
from octavo.device.kernels.triton import few as triton_few

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    "tokens, outputs, inputs", [(2, 128, 512), (17, 96, 640), (64, 208, 1024), (1, 64, 512)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_few_equals_the_product(tokens: int, outputs: int, inputs: int, bias: bool) -> None:
    x, weight = draw(tokens, inputs, seed=1), draw(outputs, inputs, seed=2)
    shift = draw(outputs, seed=3) if bias else None
    assert triton_few.takes(x, weight)
    expected = x.double() @ weight.double().t() + (0 if shift is None else shift.double())
    assert error(triton_few.few(x, weight, shift), expected) < 1e-3


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_few_equals_two_products(activation: str) -> None:
    x, weight = draw(9, 512, seed=1), draw(2 * 80, 512, seed=2) * 0.05
    gate, up = (x.double() @ weight.double().t()).half().double().chunk(2, dim=-1)
    kind = "tanh" if activation == "gelu_tanh" else "none"
    expected = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate=kind)) * up
    assert error(triton_few.gated_few(x, weight, activation), expected) < 1e-3


def test_rows_of_a_wider_tensor() -> None:
    wide, weight = draw(5, 1024, seed=1), draw(64, 512, seed=2)
    x = wide[:, 512:]
    assert triton_few.takes(x, weight)
    assert error(triton_few.few(x, weight), x.double() @ weight.double().t()) < 1e-3


def test_fp8_with_scales() -> None:
    """Both scales and the bias are applied in float32, before the one rounding."""
    x, weight = draw(7, 1024, seed=1), draw(96, 1024, seed=2)
    rows, row_scale = quantize_rows(x)
    columns, column_scale = quantize_rows(weight)
    bias = draw(96, seed=3)
    assert triton_few.takes(rows, columns)
    found = triton_few.few(rows, columns, bias, (row_scale, column_scale), torch.float16)
    exact = (rows.double() * row_scale.double()[:, None]) @ (
        columns.double() * column_scale.double()[:, None]
    ).t()
    assert found.dtype == torch.float16 and error(found, exact + bias.double()) < 2e-3


def test_what_is_left_to_the_library() -> None:
    weight = draw(64, 512, seed=2)
    assert not triton_few.takes(draw(65, 512, seed=1), weight)  # many tokens
    assert not triton_few.takes(draw(3, 512, seed=1, dtype=torch.float32), weight.float())
    assert not triton_few.takes(draw(3, 520, seed=1), draw(64, 520, seed=2))  # no whole turns
    assert not triton_few.takes(draw(3, 512, seed=1), draw(512, 64, seed=2).t())  # not contiguous
