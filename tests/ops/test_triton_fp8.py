"""The Triton kernels of fp8 weights (by the interpreter where there is no GPU) against their reference bodies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from octavo.device.ops import fp8
from octavo.device.ops.rope_store import rope_store

pytest.importorskip("triton")
from octavo.device.kernels.triton import activation, norm
from octavo.device.kernels.triton import fp8 as kernels
from octavo.device.kernels.triton import rope_store as rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOUND = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def matrix(outputs: int, size: int) -> tuple[Tensor, Tensor]:
    return fp8.quantize_rows(draw(outputs, size) / size**0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 600])
def test_quantized_rows_are_equal_to_the_bit(dtype: torch.dtype, size: int) -> None:
    x = draw(5, size, dtype=dtype) * torch.tensor([[1e-4], [1.0], [30.0], [0.0], [5.0]]).to(DEVICE, dtype)
    expected, expected_scale = fp8.quantize_rows(x)
    actual, scale, one = kernels.quantize_rows(x)
    assert torch.equal(scale, expected_scale) and one.item() == 1.0
    assert torch.equal(actual.view(torch.uint8) & 0x7F, expected.view(torch.uint8) & 0x7F)
    assert torch.equal(actual.float(), expected.float())
    view, _, _ = kernels.quantize_rows(x[:, :48])
    assert torch.equal(view.float(), fp8.quantize_rows(x[:, :48])[0].float())


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_row_stays_broken(broken: float) -> None:
    x = draw(6, 64)
    x[1, 7] = broken
    y = kernels.tensor_wise(x, *matrix(32, 64))
    assert y[1].isnan().all() and not y[[0, 2, 3, 4, 5]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token_is_not_quantized(dtype: torch.dtype) -> None:
    """Sizes that fill no tile: 70 rows of 1100."""
    x, (weight, scale), bias = draw(1, 1100, dtype=dtype), matrix(70, 1100), draw(70, dtype=dtype)
    exact = x.float() @ (weight.float() * scale[:, None]).T
    bound = BOUND[dtype]
    for shift in (None, bias):
        expected = exact if shift is None else exact + shift.float()
        actual = kernels.linear_fp8(x, weight, scale, shift)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.float(), expected, atol=bound, rtol=bound)


@pytest.mark.parametrize(
    ("way", "dtype"),
    [(kernels.linear_fp8, dtype) for dtype in DTYPES]
    + [(kernels.tensor_wise, dtype) for dtype in DTYPES]
    + [(kernels.row_wise, torch.bfloat16)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_more_tokens(way: Callable[..., Tensor], dtype: torch.dtype) -> None:
    x, (weight, scale), bias = draw(7, 96, dtype=dtype) * 3, matrix(48, 96), draw(48, dtype=dtype)
    bound = BOUND[dtype] * 2  # the raw product is rounded once more
    if DEVICE == "cuda":
        bound = max(bound, 5e-3)  # tensor cores add fp8 products in fewer bits
    for shift in (None, bias):
        actual = way(x, weight, scale, shift)
        expected = fp8.linear_fp8(x, weight, scale, shift)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.float(), expected.float(), atol=bound, rtol=bound)


def test_the_way_follows_the_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("vector", "tensor_wise", "row_wise"):
        monkeypatch.setattr(kernels, name, lambda *_, name=name, **__: taken.append(name))
    weight, scale = matrix(32, 64)
    for tokens in (1, 2, kernels.ROW_WISE_FROM - 1, kernels.ROW_WISE_FROM):
        kernels.linear_fp8(draw(tokens, 64, dtype=torch.bfloat16), weight, scale)
    kernels.linear_fp8(draw(kernels.ROW_WISE_FROM, 64, dtype=torch.float16), weight, scale)
    kernels.linear_fp8(draw(1, 64), *matrix(kernels.WIDE, 64))
    kernels.linear_fp8(draw(1, 64), *matrix(kernels.WIDE + 1, 64))
    assert taken == [
        "vector",
        "tensor_wise",
        "tensor_wise",
        "row_wise",
        "tensor_wise",
        "tensor_wise",
        "vector",
    ]


def test_sizes_the_library_does_not_take() -> None:
    x, (weight, scale) = draw(9, 40), matrix(30, 40)
    torch.testing.assert_close(
        kernels.linear_fp8(x, weight, scale), x @ (weight.float() * scale[:, None]).T, atol=1e-4, rtol=1e-4
    )
    assert kernels.linear_fp8(x[:0], weight, scale).shape == (0, 30)


def raw(rows: int, size: int, dtype: torch.dtype) -> fp8.Raw:
    """A product whose scales are still to be applied."""
    values = draw(rows, size, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    return fp8.Raw(values * 40, draw(rows).abs() / 20 + 0.01, draw(size).abs() + 0.1, dtype)


def same(actual: Tensor | fp8.Fp8Rows, expected: Tensor | fp8.Fp8Rows, bound: float) -> None:
    if isinstance(expected, fp8.Fp8Rows):
        assert isinstance(actual, fp8.Fp8Rows) and actual.values.dtype == fp8.FP8
        assert actual.one.item() == 1.0 and actual.dtype == expected.dtype
        # Scales are near; a value may fall on the neighbouring step of fp8, an eighth of itself at most.
        torch.testing.assert_close(actual.scale, expected.scale, atol=0, rtol=bound)
        actual_values, values = (rows.values.float() * rows.scale[:, None] for rows in (actual, expected))
        torch.testing.assert_close(actual_values, values, atol=bound, rtol=0.13)
        assert ((actual_values - values).norm() / values.norm()).item() < max(bound, 0.026)
    else:
        assert isinstance(actual, Tensor) and actual.dtype == expected.dtype
        torch.testing.assert_close(actual.float(), expected.float(), atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
def test_the_norm_applies_scales_and_quantizes(dtype: torch.dtype, quantize: bool, unscaled: bool) -> None:
    for rows, size in ((5, 96), (1, 600)):
        x = raw(rows, size, dtype) if unscaled else draw(rows, size, dtype=dtype)
        residual, weight = draw(rows, size, dtype=dtype), draw(size)
        theirs = residual.clone()
        expected = fp8.add_rms_norm_fp8(x, theirs, weight, 1e-5, quantize)
        actual = norm.add_rms_norm_fp8(x, residual, weight, 1e-5, quantize)
        same(actual, expected, 2 * BOUND[dtype])
        torch.testing.assert_close(residual.float(), theirs.float(), atol=BOUND[dtype], rtol=BOUND[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("name", ["silu", "gelu_tanh", "gelu"])
def test_the_activation_applies_scales_and_quantizes(
    dtype: torch.dtype, quantize: bool, unscaled: bool, name: str
) -> None:
    for rows, size in ((5, 96), (1, 1100)):
        wide = raw(rows, 2 * size, dtype) if unscaled else draw(rows, 2 * size, dtype=dtype)
        expected = fp8.act_mul_fp8(wide, name, quantize)
        same(activation.act_mul_fp8(wide, name, quantize), expected, 2 * BOUND[dtype])


@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value")  # of the interpreter
def test_a_broken_row_stays_broken_through_the_fused_kernels() -> None:
    x, residual = draw(4, 64), draw(4, 64)
    x[2, 5] = float("nan")
    rows = norm.add_rms_norm_fp8(x, residual, draw(64), 1e-5, True)
    assert rows.scale.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantized_rows_and_raw_products_are_the_plain_ones(dtype: torch.dtype) -> None:
    x, (weight, scale) = draw(7, 96, dtype=dtype), matrix(48, 96)
    plain = kernels.linear_fp8(x, weight, scale)
    values, token_scale, one = kernels.quantize_rows(x)
    rows = fp8.Fp8Rows(values, token_scale, one, dtype)
    assert torch.equal(kernels.linear_fp8(rows, weight, scale), plain)
    product = kernels.linear_fp8(rows, weight, scale, None, True)
    assert isinstance(product, fp8.Raw)
    torch.testing.assert_close(product.settled(), plain, atol=BOUND[dtype], rtol=BOUND[dtype])
    assert torch.equal(product.take(torch.tensor([3, 1])).settled(), product.settled()[[3, 1]])
    assert isinstance(kernels.linear_fp8(x, weight, scale, draw(48, dtype=dtype), True), Tensor), (
        "a bias ends it"
    )
    assert isinstance(kernels.linear_fp8(x[:1], weight, scale, None, True), Tensor), (
        "one token is not quantized"
    )


def test_who_quantizes_is_told_ahead() -> None:
    for tokens, outputs in ((1, 64), (2, 64), (1, kernels.WIDE), (600, 64)):
        x, (weight, scale) = draw(tokens, 32, dtype=torch.bfloat16), matrix(outputs, 32)
        takes = fp8.takes_rows(outputs, 32, tokens, "cuda")
        result = kernels.linear_fp8(x, weight, scale, None, True)
        assert takes == (tokens > 1 or outputs >= kernels.WIDE)
        assert isinstance(result, fp8.Raw) == (takes and tokens < kernels.ROW_WISE_FROM)
    assert not fp8.takes_rows(30, 40, 9, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rotary", [0, 16, 32])
def test_the_rotation_applies_scales(dtype: torch.dtype, normed: bool, rotary: int) -> None:
    tokens, heads, kv_heads, dim = 3, 4, 2, 32
    qkv = raw(tokens, (heads + 2 * kv_heads) * dim, dtype)
    weight = draw(dim) + 2 if normed else None
    cos_sin = draw(16, rotary).clamp(-1, 1) if rotary else None
    positions, slots = torch.tensor([0, 9, 4], device=DEVICE), torch.tensor([5, -1, 17], device=DEVICE)
    pages = [torch.zeros(2, 2, kv_heads, 16, dim, dtype=dtype, device=DEVICE) for _ in range(2)]
    arguments = (weight, weight, 1e-6, cos_sin, positions)
    actual = rope.rope_store(qkv, *arguments, pages[0], slots, heads)
    expected = rope_store(qkv, *arguments, pages[1], slots, heads)
    bound = 4 * BOUND[dtype]
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected.float(), atol=bound, rtol=bound)
    torch.testing.assert_close(pages[0].float(), pages[1].float(), atol=bound, rtol=bound)
