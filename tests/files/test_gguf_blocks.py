"""GGUF block formats: bit-exact with the reference package, whatever the bytes are."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch

from octavo.errors import ModelFileError
from octavo.files.dtypes import GGUF_TYPES_BY_NAME
from octavo.model.quantization.decode import CHUNK_ELEMENTS, dequantize
from octavo.model.quantization.gguf_blocks import DECODERS, ENCODERS, dequantize_blocks, quantize_blocks

BLOCK_TYPES = [name for name, (_, kind) in GGUF_TYPES_BY_NAME.items() if kind.block > 1]


def oracle(raw: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    number, kind = GGUF_TYPES_BY_NAME[name]
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(
            raw.reshape(-1, kind.nbytes), gguf.GGMLQuantizationType(number)
        ).reshape(-1)


def bits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 as bits, all NaNs alike (which of them arithmetic gives is up to the processor)."""
    return np.where(np.isnan(values), np.uint32(0x7FC00000), values.view(np.uint32))


def test_every_type_has_a_decoder_and_the_reference_sizes() -> None:
    assert set(DECODERS) == set(GGUF_TYPES_BY_NAME)
    for number, kind in GGUF_TYPES_BY_NAME.values():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (kind.block, kind.nbytes)
        assert gguf.GGMLQuantizationType(number).name == kind.name


@pytest.mark.parametrize("name", list(GGUF_TYPES_BY_NAME))
@pytest.mark.parametrize("fill", ["random", "zeros", "ones", "low", "high"])
def test_dequantization_is_bit_exact(name: str, fill: str) -> None:
    """Random bytes hold every kind of scale: subnormal, huge, infinite, NaN, negative."""
    kind = GGUF_TYPES_BY_NAME[name][1]
    rng = np.random.default_rng(7)
    value = {"zeros": 0x00, "ones": 0xFF, "low": 0x0F, "high": 0xF0}.get(fill)
    raw = rng.integers(0, 256, 300 * kind.nbytes, dtype=np.uint8)
    if value is not None:
        raw[:] = value
    assert np.array_equal(bits(dequantize_blocks(raw, name)), bits(oracle(raw, name)))


@pytest.mark.parametrize("name", list(ENCODERS))
def test_quantization_is_bit_exact(name: str) -> None:
    number, _ = GGUF_TYPES_BY_NAME[name]
    rng = np.random.default_rng(11)
    values = (rng.standard_normal((400, 256)) * 10.0 ** rng.integers(-9, 5, (400, 1))).astype(np.float32)
    values[0] = 0
    values[1] = 1
    values[2, ::2] = -values[2, 1::2]  # ties for the largest magnitude
    values[3] = np.arange(256) / 2  # halves
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType(number)).view(np.uint8).reshape(-1)
    assert np.array_equal(quantize_blocks(values, name), expected)


@pytest.mark.parametrize(("name", "steps"), [("Q4_0", 16), ("Q4_1", 15), ("Q8_0", 254)])
def test_quantization_error_is_within_half_a_step(name: str, steps: int) -> None:
    values = np.random.default_rng(3).uniform(-1, 1, (64, 32)).astype(np.float32)
    back = dequantize_blocks(quantize_blocks(values, name), name).reshape(values.shape)
    # Q4_0 has its 16 levels from -8 to 7, so the far end may be a whole step off.
    step = 2.0 / steps * (2 if name == "Q4_0" else 1)
    assert np.abs(back - values).max() <= step / 2 + 2e-3  # the scale itself is an fp16


def test_bfloat16_keeps_nan_and_rounds_to_even() -> None:
    values = np.array([np.nan, np.inf, -np.inf, 1.0, 1.00390625, 1.01171875], np.float32)
    back = dequantize_blocks(quantize_blocks(values, "BF16"), "BF16")
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    assert np.array_equal(back, expected, equal_nan=True)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_decode_streams_chunks_and_equals_one_pass(name: str) -> None:
    kind = GGUF_TYPES_BY_NAME[name][1]
    shape = (9, CHUNK_ELEMENTS // 8)  # more than one chunk, the last one short
    rng = np.random.default_rng(5)
    raw = rng.integers(0, 256, shape[0] * shape[1] // kind.block * kind.nbytes, dtype=np.uint8)
    raw.flags.writeable = False  # as a mapped file is
    whole = dequantize_blocks(raw, name).reshape(shape)
    result = dequantize(raw, name, shape)
    assert result.dtype == torch.float32 and result.shape == shape
    assert np.array_equal(bits(result.numpy()), bits(whole))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_decode_of_plain_types_into_a_given_tensor(name: str) -> None:
    values = np.random.default_rng(1).standard_normal((8, 24)).astype(np.float32)
    raw = quantize_blocks(values, name)
    raw.flags.writeable = False
    out = torch.empty(8, 24, dtype=torch.bfloat16)
    assert dequantize(raw, name, (8, 24), out) is out
    assert torch.equal(out, torch.from_numpy(dequantize_blocks(raw, name).copy()).view(8, 24).bfloat16())


def test_misfits_are_errors() -> None:
    raw = np.zeros(18, np.uint8)
    with pytest.raises(ModelFileError, match="no GGUF type"):
        dequantize_blocks(raw, "IQ2_XS")
    with pytest.raises(ModelFileError, match="no whole number of Q4_0 blocks"):
        dequantize_blocks(raw[:17], "Q4_0")
    with pytest.raises(ModelFileError, match="Writing Q6_K is not supported"):
        quantize_blocks(np.zeros(256), "Q6_K")
    with pytest.raises(ModelFileError, match="31 values"):
        quantize_blocks(np.zeros(31), "Q4_0")
    with pytest.raises(ModelFileError, match="not a tensor of shape"):
        dequantize(raw, "Q4_0", (2, 32))
    with pytest.raises(ModelFileError, match="cannot be decoded"):
        dequantize(raw, "I64", (2,))
    with pytest.raises(ModelFileError, match="decoded into"):
        dequantize(raw, "Q4_0", (1, 32), torch.empty(31))
