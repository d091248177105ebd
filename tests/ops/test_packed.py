"""Packed codes: the layout's reversibility, its reference body, and the Triton kernels against it."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from packed_cases import DEVICE, LAYOUTS, draw, normal

from octavo.device.ops import packed as ops
from octavo.device.ops.packed import (
    Layout,
    empty_packed,
    linear_packed,
    pack_codes,
    split_fields,
    unpack,
    unpack_codes,
)

# The interpreter multiplies no bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("inputs", [256, 320])
def test_codes_come_back(name: str, inputs: int) -> None:
    layout = LAYOUTS[name]
    codes = torch.randint(0, 2 ** (layout.bits + layout.high_bits), (6, inputs)).to(torch.uint8)
    weight = empty_packed(layout, 6, inputs, torch.device("cpu"))
    words, high = pack_codes(codes, layout)
    assert words.shape == weight.words.shape and words.dtype == torch.int32
    assert (high is None) == (weight.high is None)
    weight.words, weight.high = words, high
    assert torch.equal(unpack_codes(weight), codes)


def test_the_drawing() -> None:
    """Input 32 place + w of a run is in word w, at bit 4 (place / 2), odd places in the upper half."""
    layout = LAYOUTS["awq"]
    codes = torch.zeros((1, 512), dtype=torch.uint8)
    codes[0, 256 + 5 * 32 + 3] = 9
    words, _ = pack_codes(codes, layout)
    assert words.shape == (2, 1, 32)
    expected = torch.zeros_like(words)
    expected[1, 0, 3] = 9 << (16 + 8)
    assert torch.equal(words, expected)


def test_reference_in_words() -> None:
    """value = scale (code - zero), one scale for 128 inputs."""
    weight = draw(LAYOUTS["awq"], 8, 256)
    codes, x = unpack_codes(weight).float(), normal(3, 256)
    halves = (
        split_fields(weight.scale, torch.float16)[:, ::2],
        split_fields(weight.scale, torch.int16)[:, 1::2],
    )
    scale, zero = (half.float().repeat_interleave(128, 1) for half in halves)
    values = (codes - zero) * scale
    bias = normal(8)
    torch.testing.assert_close(linear_packed(x, weight, bias), x @ values.T + bias, atol=1e-4, rtol=1e-4)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    weight.order = order
    torch.testing.assert_close(linear_packed(x, weight), x[:, order] @ values.T, atol=1e-4, rtol=1e-4)
    wide = torch.zeros((3, 10), device=DEVICE)
    linear_packed(x, weight, None, wide[:, 1:9])
    assert torch.equal(wide[:, 1:9], linear_packed(x, weight)) and not wide[:, [0, 9]].any()
    part = ops.rows_of(weight, slice(2, 5))
    assert torch.equal(unpack(part), unpack(weight)[2:5]) and part.outputs == 3


def test_impossible_layouts() -> None:
    wrong: dict[str, Any]
    for wrong in (
        {"bits": 5},
        {"width": 8},
        {"group": 48},
        {"bits": 2, "scales": "k"},
        {"bits": 2, "high_bits": 2},
    ):
        with pytest.raises(ValueError, match="no such layout"):
            Layout(**wrong)


triton = pytest.importorskip("triton")
if DEVICE == "cpu":
    assert os.environ.get("TRITON_INTERPRET") == "1"
import triton.language as tl

from octavo.device.kernels.triton import packed as kernels

BOUND = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@pytest.fixture
def few_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each kind: the interpreter takes its time."""
    monkeypatch.setattr(kernels, "BLOCKS", (8, 32))
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels.LinearPacked, "_warm", lambda *_: None)


@pytest.mark.usefixtures("few_kernels")
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in LAYOUTS for dtype in DTYPES[1:]]
    + [("awq", torch.float32), ("nf4", torch.float32)],
)
def test_kernels(name: str, dtype: torch.dtype, tokens: int) -> None:
    """Few tokens over split inputs, more in tiles; outputs and inputs that fill no tile; a bias."""
    layout = LAYOUTS[name]
    inputs = 512 if layout.scales in ("k", "k4", "bytes") else 320
    weight, bias, x = draw(layout, 40, inputs), normal(40, dtype=dtype), normal(tokens, inputs, dtype=dtype)
    linear = kernels.LinearPacked()
    actual = linear(x, weight, bias)
    assert actual.dtype == dtype
    torch.testing.assert_close(
        actual, linear_packed(x, weight, bias), atol=BOUND[dtype] * 2, rtol=BOUND[dtype]
    )
    assert linear.counters is not None and not linear.counters.any()


@pytest.mark.parametrize("name", LAYOUTS)
def test_written_out_values_are_exact(name: str) -> None:
    layout = LAYOUTS[name]
    weight = draw(layout, 70, 512)
    expected = unpack(weight)
    found = torch.cat(
        [
            kernels.write_out(weight, slice(0, 66), torch.float32),
            kernels.write_out(weight, slice(66, 70), torch.float32),
        ]
    )
    if layout.scales in ("minimum", "k", "k4"):  # a fused multiply and add on a GPU
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    else:
        assert torch.equal(found, expected)


@pytest.mark.usefixtures("few_kernels")
def test_many_tokens_use_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WRITE_OUT_FROM", 3)
    monkeypatch.setattr(kernels, "WRITE_OUT_ELEMENTS", 128 * 256)
    weight, bias, x = draw(LAYOUTS["q4_k"], 200, 256), normal(200), normal(5, 256)
    torch.testing.assert_close(
        kernels.LinearPacked()(x, weight, bias), linear_packed(x, weight, bias), atol=1e-4, rtol=1e-4
    )


@pytest.mark.usefixtures("few_kernels")
def test_order_and_columns() -> None:
    weight, x = draw(LAYOUTS["awq"], 64, 256), normal(4, 256)
    weight.order = torch.randperm(256, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    wide = torch.zeros((4, 100), device=DEVICE)
    kernels.LinearPacked()(x, weight, None, wide[:, 20:84])
    torch.testing.assert_close(wide[:, 20:84], linear_packed(x, weight), atol=1e-4, rtol=1e-4)
    assert not wide[:, :20].any() and not wide[:, 84:].any()
    assert kernels.LinearPacked()(x[:0], weight).shape == (0, 64)


@triton.jit
def _show(
    out, words, high, W: tl.constexpr, PLACE: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr, CODE: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    at = tl.arange(0, W)
    extra = tl.load(words + at)
    if HIGH > 0:
        extra = kernels._spread(tl.load(high + at), HIGH)
    found = kernels._codes(tl.load(words + at), extra, PLACE, BITS, HIGH, CODE, KIND)
    tl.store(out + at, found.to(tl.float32) - kernels._base(KIND, BITS, CODE))


@pytest.mark.parametrize("kind", [tl.bfloat16, tl.float16, tl.float32], ids=str)
@pytest.mark.parametrize("name", ["awq", "q5_k", "q8_0", "mxfp4", "fp8", "q2_k", "q3_k", "iq4_nl"])
def test_codes_become_numbers_exactly(name: str, kind: tl.dtype) -> None:
    """Every code at every place, in every type; what the interpreter cannot multiply it can still take apart."""
    layout = LAYOUTS[name]
    codes = torch.arange(layout.run).to(torch.uint8).view(1, -1) & (2 ** (layout.bits + layout.high_bits) - 1)
    if layout.code == "e4m3":
        codes = codes & 0x77  # no NaN
    words, high = pack_codes(codes.to(DEVICE), layout)
    constants = kernels.constants(layout)
    for place in range(layout.places):
        width = layout.width
        out = torch.empty(width, device=DEVICE)
        _show[(1,)](
            out, words, high, width, place, constants["BITS"], constants["HIGH"], constants["CODE"], kind
        )
        here = codes[0, width * place : width * (place + 1)]
        expected = here.float()
        if layout.code in ops.TABLES:
            expected = torch.tensor(ops.TABLES[layout.code], dtype=torch.float32)[here.long()]
        elif layout.code == "e4m3":
            expected = here.view(torch.float8_e4m3fn).float()
        if (
            name == "mxfp4" and kind == tl.bfloat16 and DEVICE == "cpu"
        ):  # the interpreter flushes subnormal numbers
            out[expected.abs() == 0.5] = expected[expected.abs() == 0.5]
        assert torch.equal(out.cpu(), expected), place
