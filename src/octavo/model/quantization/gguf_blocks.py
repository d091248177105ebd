"""GGUF block formats in numpy: the exact values every kernel must agree with.

A block is a run of 32 or 256 consecutive elements of a row. Functions take whole blocks as [num_blocks, block_bytes]
uint8 and give [num_blocks, block] float32 (or the reverse). The order of the float32 operations is part of the
definition, so that results are equal bit for bit across implementations. Infinite or NaN scales give infinities and
NaNs, as arithmetic does. Source: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.errors import ModelFileError
from octavo.files.dtypes import GGUF_TYPES_BY_NAME

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
MXFP4_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def dequantize_blocks(raw: Bytes, type_name: str) -> Floats:
    """All elements of ``raw`` (flat uint8, whole blocks) as flat float32, in order.

    Raises ``ModelFileError`` for an unknown type or a length that is no multiple of its block.
    """
    _, kind = _type(type_name)
    if raw.size % kind.nbytes:
        raise ModelFileError(f"{raw.size} bytes are no whole number of {type_name} blocks of {kind.nbytes}.")
    blocks = np.ascontiguousarray(raw).reshape(-1, kind.nbytes)
    with np.errstate(over="ignore", invalid="ignore"):  # files may hold infinite scales
        return DECODERS[type_name](blocks).reshape(-1)


def quantize_blocks(values: NDArray[Any], type_name: str) -> Bytes:
    """``values`` (any shape, read as flat float32) as flat uint8 blocks of F32, F16, BF16, Q4_0, Q4_1 or Q8_0.

    Raises ``ModelFileError`` for a type that cannot be written or a size that is no multiple of its block.
    """
    _, kind = _type(type_name)
    flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
    encoder = ENCODERS.get(type_name)
    if encoder is None:
        raise ModelFileError(f"Writing {type_name} is not supported.", f"Use one of {', '.join(ENCODERS)}.")
    if flat.size % kind.block:
        raise ModelFileError(f"{flat.size} values are no whole number of {type_name} blocks of {kind.block}.")
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return encoder(flat.reshape(-1, kind.block)).reshape(-1)


def _type(name: str) -> tuple[int, Any]:
    found = GGUF_TYPES_BY_NAME.get(name)
    if found is None:
        raise ModelFileError(
            f"{name} is no GGUF type that Octavo reads.", f"Known: {', '.join(GGUF_TYPES_BY_NAME)}."
        )
    return found


def _half(blocks: Bytes, at: int) -> Floats:
    """The fp16 number at byte ``at`` of every block, as a float32 column."""
    return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """[n, k] bytes to [n, 2k]: all low nibbles, then all high ones (element i and i + k share byte i)."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """The 32 bits at byte ``at`` as [n, 32] of 0 or 16: bit i belongs to element i."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)


# --- 32-blocks ---------------------------------------------------------------------------------------------------


def _decode_f32(blocks: Bytes) -> Floats:
    return blocks.view(np.float32)


def _decode_f16(blocks: Bytes) -> Floats:
    return blocks.view(np.float16).astype(np.float32)


def _decode_bf16(blocks: Bytes) -> Floats:
    return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _decode_q4_0(blocks: Bytes) -> Floats:
    """half d | 16 bytes; d * (q - 8)."""
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - np.float32(8))


def _decode_q4_1(blocks: Bytes) -> Floats:
    """half d | half m | 16 bytes; d * q + m."""
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _decode_mxfp4(blocks: Bytes) -> Floats:
    """exponent e | 16 bytes; 2^(e - 128) times twice the 4-bit float, so that both are whole."""
    exponent = blocks[:, :1].astype(np.uint32)
    scale = np.where(
        exponent < 2, np.uint32(0x00200000) << exponent, (exponent - np.uint32(1)) << np.uint32(23)
    )
    return scale.view(np.float32) * MXFP4_DOUBLED[_nibbles(blocks[:, 1:])]


def _decode_q5_0(blocks: Bytes) -> Floats:
    """half d | 32 high bits | 16 bytes; d * (q - 16)."""
    quants = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (quants.astype(np.float32) - np.float32(16))


def _decode_q5_1(blocks: Bytes) -> Floats:
    """half d | half m | 32 high bits | 16 bytes; d * q + m."""
    quants = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * quants.astype(np.float32) + _half(blocks, 2)


def _decode_q8_0(blocks: Bytes) -> Floats:
    """half d | 32 signed bytes; d * q."""
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


# --- 256-blocks: 8 (Q4_K, Q5_K) or 16 (Q2_K, Q3_K, Q6_K) sub-blocks with their own small scales --------------------------------


def unpack_k_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The 6-bit scales and minimums of Q4_K and Q5_K: [n, 12] bytes to two [n, 8] (0 to 63).

    Sub-blocks 0-3 have theirs in the low 6 bits of bytes 0-3 (scale) and 4-7 (minimum); sub-blocks 4-7 have the low
    4 bits in bytes 8-11 (scale in the low nibble, minimum in the high one) and the high 2 bits on top of bytes 0-7.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    minimums = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return scales, minimums


def _k_nibbles(packed: Bytes) -> Bytes:
    """[n, 128] bytes to [n, 8, 32]: each run of 32 bytes holds one sub-block low and the next one high."""
    runs = packed.reshape(-1, 4, 1, 32)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(-1, 8, 32)


def _scale_k(blocks: Bytes, quants: Bytes) -> Floats:
    """half d | half dmin | 12 bytes of scales; (d * scale) * q - (dmin * minimum)."""
    scales, minimums = unpack_k_scales(blocks[:, 4:16])
    scale = (_half(blocks, 0) * scales.astype(np.float32))[:, :, None]
    minimum = (_half(blocks, 2) * minimums.astype(np.float32))[:, :, None]
    return (scale * quants.astype(np.float32) - minimum).reshape(-1, 256)


def _decode_q4_k(blocks: Bytes) -> Floats:
    """Scales as in ``_scale_k`` | 128 bytes of nibbles."""
    return _scale_k(blocks, _k_nibbles(blocks[:, 16:]))


def _decode_q5_k(blocks: Bytes) -> Floats:
    """Scales as in ``_scale_k`` | 32 bytes, whose bit j is element i's fifth bit in sub-block j | nibbles."""
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None] & np.uint8(1)
    return _scale_k(blocks, _k_nibbles(blocks[:, 48:]) | (high << np.uint8(4)))


def _decode_q6_k(blocks: Bytes) -> Floats:
    """128 bytes of low nibbles | 64 bytes of high bit pairs | 16 signed scales | half d; (d * scale) * (q - 32).

    Each half of the block (128 elements) has 64 bytes low and 32 bytes high: four runs of 32 elements take the low
    nibbles of bytes 0-31, of 32-63, then the high nibbles of both; run r takes bits 2r and 2r+1 of the high bytes.
    """
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & np.uint8(3)
    quants = (low | (high << 4)).astype(np.float32).reshape(-1, 16, 16) - np.float32(32)
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (scale[:, :, None] * quants).reshape(-1, 256)


def _two_bits(packed: Bytes) -> Bytes:
    """[n, 64] bytes to [n, 256]: each run of 32 bytes holds four sub-blocks of 32, lowest bits first."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (packed.reshape(-1, 2, 1, 32) >> shifts & np.uint8(3)).reshape(-1, 256)


def _decode_q2_k(blocks: Bytes) -> Floats:
    """16 bytes of a scale (low nibble) and a minimum | 64 bytes of pairs of bits | half d | half dmin; as Q4_K, by 16."""
    scale = (_half(blocks, 80) * (blocks[:, :16] & 15).astype(np.float32))[:, :, None]
    minimum = (_half(blocks, 82) * (blocks[:, :16] >> 4).astype(np.float32))[:, :, None]
    quants = _two_bits(blocks[:, 16:80]).astype(np.float32).reshape(-1, 16, 16)
    return (scale * quants - minimum).reshape(-1, 256)


def unpack_q3_k_scales(packed: Bytes) -> NDArray[np.int8]:
    """[n, 12] bytes to [n, 16] (-32 to 31): nibbles of bytes 0-7, low ones first; pairs of bits of bytes 8-11 above them."""
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = np.concatenate([packed[:, 8:] >> np.uint8(shift) & np.uint8(3) for shift in (0, 2, 4, 6)], axis=1)
    found: NDArray[np.int8] = (low | high << np.uint8(4)).astype(np.int8) - np.int8(32)
    return found


def _decode_q3_k(blocks: Bytes) -> Floats:
    """32 bytes, whose bit j is element i's third bit in sub-block j | 64 bytes of pairs of bits | 12 of scales | half d;
    (d * scale) * (q - 4)."""
    high = blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[None, :, None] & np.uint8(1)
    quants = _two_bits(blocks[:, 32:96]) | (high << np.uint8(2)).reshape(-1, 256)
    scale = _half(blocks, 108) * unpack_q3_k_scales(blocks[:, 96:108]).astype(np.float32)
    return (scale[:, :, None] * (quants.astype(np.float32).reshape(-1, 16, 16) - np.float32(4))).reshape(
        -1, 256
    )


# --- 4-bit places in a table of sixteen values ---------------------------------------------------------------------


def _decode_iq4_nl(blocks: Bytes) -> Floats:
    """half d | 16 bytes; d * v[q]."""
    return _half(blocks, 0) * IQ4_VALUES[_nibbles(blocks[:, 2:])]


def unpack_iq4_xs_scales(blocks: Bytes) -> NDArray[np.int8]:
    """[n, 6] bytes to [n, 8] (-32 to 31): 16 bits hold the high pairs, lowest first, 4 bytes the nibbles below them."""
    low = np.stack([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=2).reshape(-1, 8)
    high = np.stack([blocks[:, :2] >> np.uint8(shift) & np.uint8(3) for shift in (0, 2, 4, 6)], axis=2)
    found: NDArray[np.int8] = (low | high.reshape(-1, 8) << np.uint8(4)).astype(np.int8) - np.int8(32)
    return found


def _decode_iq4_xs(blocks: Bytes) -> Floats:
    """half d | 6 bytes of scales | 16 bytes of nibbles for each 32 elements; (d * scale) * v[q]."""
    scale = _half(blocks, 0) * unpack_iq4_xs_scales(blocks[:, 2:8]).astype(np.float32)
    quants = _nibbles(blocks[:, 8:].reshape(-1, 16)).reshape(-1, 8, 32)
    return (scale[:, :, None] * IQ4_VALUES[quants]).reshape(-1, 256)


# --- quantizers: round to nearest as the format's reference does ---------------------------------------------------


def _encode_f32(values: Floats) -> Bytes:
    return values.view(np.uint8)


def _encode_f16(values: Floats) -> Bytes:
    return values.astype(np.float16).view(np.uint8)


def _encode_bf16(values: Floats) -> Bytes:
    bits = values.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16  # to nearest, ties to even
    quiet = bits >> 16 | 64  # rounding could carry a NaN into an infinity
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16).view(np.uint8)


def _inverse(scale: Floats) -> Floats:
    return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def _pack_nibbles(quants: Bytes) -> Bytes:
    """[n, 32] values of 0 to 15 to [n, 16] bytes."""
    return quants[:, :16] | (quants[:, 16:] << np.uint8(4))


def _bytes_of_half(column: Floats) -> Bytes:
    return column.astype(np.float16).view(np.uint8)


def _encode_q4_0(values: Floats) -> Bytes:
    """The value of largest magnitude becomes -8 * d exactly."""
    extreme = np.take_along_axis(values, np.abs(values).argmax(axis=1, keepdims=True), axis=1)
    scale = extreme / np.float32(-8)
    # float64: the product and the sum must not be rounded before the truncation
    quants = np.trunc(values.astype(np.float64) * _inverse(scale) + 8.5).clip(0, 15).astype(np.uint8)
    return np.concatenate([_bytes_of_half(scale), _pack_nibbles(quants)], axis=1)


def _encode_q4_1(values: Floats) -> Bytes:
    """From the minimum up in 15 steps."""
    minimum = values.min(axis=1, keepdims=True)
    scale = (values.max(axis=1, keepdims=True) - minimum) / np.float32(15)
    quants = np.trunc((values - minimum) * _inverse(scale) + np.float32(0.5)).clip(0, 15).astype(np.uint8)
    return np.concatenate([_bytes_of_half(scale), _bytes_of_half(minimum), _pack_nibbles(quants)], axis=1)


def _encode_q8_0(values: Floats) -> Bytes:
    """The largest magnitude becomes 127 * d; halves round away from zero."""
    scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    scaled = values * _inverse(scale)
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    quants = np.sign(scaled) * (whole + np.floor(2 * (magnitude - whole)))
    return np.concatenate([_bytes_of_half(scale), quants.astype(np.int8).view(np.uint8)], axis=1)


DECODERS: dict[str, Callable[[Bytes], Floats]] = {
    "F32": _decode_f32,
    "F16": _decode_f16,
    "BF16": _decode_bf16,
    "Q4_0": _decode_q4_0,
    "Q4_1": _decode_q4_1,
    "MXFP4": _decode_mxfp4,
    "Q5_0": _decode_q5_0,
    "Q5_1": _decode_q5_1,
    "Q8_0": _decode_q8_0,
    "Q2_K": _decode_q2_k,
    "Q3_K": _decode_q3_k,
    "Q4_K": _decode_q4_k,
    "Q5_K": _decode_q5_k,
    "Q6_K": _decode_q6_k,
    "IQ4_NL": _decode_iq4_nl,
    "IQ4_XS": _decode_iq4_xs,
}
ENCODERS: dict[str, Callable[[Floats], Bytes]] = {
    "F32": _encode_f32,
    "F16": _encode_f16,
    "BF16": _encode_bf16,
    "Q4_0": _encode_q4_0,
    "Q4_1": _encode_q4_1,
    "Q8_0": _encode_q8_0,
}
