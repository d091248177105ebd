"""Panels: how weight matrices lie in memory for the dot-product kernels, and the lossless way there from GGUF blocks.

A panel holds 16 output rows. Along the input dimension it is cut into blocks of 32. Within a block, vector g of 64
bytes holds, for each of the 16 rows, the four weights 4g .. 4g+3: one int32 lane a row.

    8 bits   8 vectors                       one byte a weight
    2 bits   2 vectors                       bits 2 g and 2 g + 1: vector g of weights 0..15 (first), of 16..31 (second)
    3 bits   2 bits + 64 bytes               the third bits as the fifth ones below
    4 bits   4 vectors                       low nibble: weights 0..15 (vectors 0..3), high nibble: 16..31 (4..7)
    5 bits   4 bits + 64 bytes               bit r*4+j of 8-byte word g = fifth bit of weight 4g+j of row r
    6 bits   4 bits + 128 bytes              two bits of vectors 0..3 in the first 64 bytes, of 4..7 in the second
    split    8 bits in two planes: the upper six bits of all panels, as above; behind them the lower two bits of all
             panels, 128 bytes a block in the order of the 6-bit layout's pairs. A pass may read the first plane alone.

Scales lie in a stream of their own, per block of 32 ("zero": 16 scales; "min": 16 scales, 16 minima; all float16) or
per super-block of 256 ("super": 16 d, 16 dmin, then 8 x (16 scales, 16 minima) as bytes; "super16": 16 d, then 16 x 16
signed scales for blocks of 16; "super32": 16 d, then 8 x 16 signed scales for blocks of 32; "super16min": 16 d, 16
dmin, then 16 x 16 scales and 16 x 16 minima for blocks of 16). Values are weight = scale * (q - zero), scale * q +
minimum, d * scale * q - dmin * minimum and d * scale * (q - zero); with a table, q is looked up in it first. Nothing is
rounded: the numbers are the file's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
ROWS = 16  # of a panel
BLOCK = 32  # weights that share an activation scale


@dataclass(frozen=True)
class PanelFormat:
    """One panel layout; ``code`` identifies it in compiled code."""

    name: str
    code: int
    bits: int
    scheme: str
    zero: float = 0
    split: bool = False
    table: tuple[int, ...] = ()

    @property
    def value_bits(self) -> int:
        """Bits of what is multiplied."""
        return 8 if self.table else self.bits

    @property
    def block_bytes(self) -> int:
        """Quant bytes of one block of a panel, all planes together."""
        return 64 * self.bits

    @property
    def planes(self) -> tuple[int, ...]:
        """Bytes of one block in each plane."""
        return (UPPER6.block_bytes, 64 * LOWER_BITS) if self.split else (self.block_bytes,)

    @property
    def group(self) -> int:
        """Weights the scale stream counts by; the input size must be a multiple."""
        return 256 if self.scheme.startswith("super") else BLOCK

    @property
    def group_bytes(self) -> int:
        """Scale bytes of one group of a panel."""
        return {"zero": 32, "min": 64, "super": 320, "super16": 288, "super32": 160, "super16min": 576}[
            self.scheme
        ]

    def panel_bytes(self, in_features: int) -> int:
        """Quant bytes of one panel."""
        return in_features // BLOCK * self.block_bytes

    def scale_bytes(self, in_features: int) -> int:
        """Scale bytes of one panel."""
        return in_features // self.group * self.group_bytes


ZERO4 = PanelFormat("zero4", 0, 4, "zero", 8)
MIN4 = PanelFormat("min4", 1, 4, "min")
ZERO5 = PanelFormat("zero5", 2, 5, "zero", 16)
MIN5 = PanelFormat("min5", 3, 5, "min")
ZERO8 = PanelFormat("zero8", 4, 8, "zero", 128)
SUPER4 = PanelFormat("super4", 5, 4, "super")
SUPER5 = PanelFormat("super5", 6, 5, "super")
SUPER6 = PanelFormat("super6", 7, 6, "super16", 32)
LOWER_BITS = 2
SPLIT8 = PanelFormat("split8", 8, 8, "zero", 128, split=True)
# Its first plane alone: four times (q - zero), half way between what the lower bits can add.
UPPER6 = PanelFormat("upper6", 9, 6, "zero", (128 - 1.5) / 4)
SUPER2 = PanelFormat("super2", 10, 2, "super16min")
SUPER3 = PanelFormat("super3", 11, 3, "super16", 4)
# ggml's values of IQ4, 128 more each.
IQ4 = (1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241)
TABLE4 = PanelFormat("table4", 12, 4, "zero", 128, table=IQ4)
SUPER_TABLE4 = PanelFormat("supertable4", 13, 4, "super32", 128, table=IQ4)
FORMATS = (ZERO4, MIN4, ZERO5, MIN5, ZERO8, SUPER2, SUPER3, SUPER4, SUPER5, SUPER6, TABLE4, SUPER_TABLE4)
# By code: bits of the first plane, and what is taken off whole codes.
BY_CODE = sorted((*FORMATS, SPLIT8, UPPER6), key=lambda form: form.code)
BITS = tuple(form.planes[0] // 64 for form in BY_CODE)
ZEROS = tuple(int(form.zero) for form in BY_CODE)

BY_DTYPE = {
    "Q4_0": ZERO4,
    "Q4_1": MIN4,
    "Q5_0": ZERO5,
    "Q5_1": MIN5,
    "Q8_0": ZERO8,
    "Q2_K": SUPER2,
    "Q3_K": SUPER3,
    "Q4_K": SUPER4,
    "Q5_K": SUPER5,
    "Q6_K": SUPER6,
    "IQ4_NL": TABLE4,
    "IQ4_XS": SUPER_TABLE4,
}

DENSE_CODES = {"F32": 16, "F16": 17, "BF16": 18}
DENSE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def pack(dtype: str, raw: Bytes, in_features: int, weights: Bytes, scales: Bytes) -> None:
    """Repack rows of GGUF blocks into panels.

    ``raw`` uint8 [rows, row bytes] with rows a multiple of 16; ``weights`` and ``scales`` uint8 [rows / 16, panel
    bytes] are written.
    """
    unpack = {
        "Q4_0": _split_4,
        "Q4_1": _split_4,
        "Q5_0": _split_5,
        "Q5_1": _split_5,
        "Q8_0": _split_8,
        "Q2_K": _split_2k,
        "Q3_K": _split_3k,
        "Q4_K": _split_4k,
        "Q5_K": _split_5k,
        "Q6_K": _split_6k,
        "IQ4_NL": _split_4,
        "IQ4_XS": _split_4xs,
    }[dtype]
    form = BY_DTYPE[dtype]
    panels = len(raw) // ROWS
    blocks = in_features // BLOCK
    low, high, groups = unpack(raw, in_features)
    body = weights.reshape(panels, blocks, form.block_bytes)
    words = low.view(np.uint32).reshape(panels, ROWS, blocks, -1)
    count = words.shape[3] * 64
    body[:, :, :count] = _lanes(words).reshape(panels, blocks, count)
    if high is not None:
        body[:, :, count:] = _high_bits(form, high.reshape(panels, ROWS, blocks, 8, 4))
    # Scale fields: each [rows, groups, entries, item bytes] becomes [panel, group, entry, row].
    out, start = scales.reshape(panels, in_features // form.group, form.group_bytes), 0
    for field in groups:
        field = field.reshape(panels, ROWS, out.shape[1], -1)
        wide = np.ascontiguousarray(field.transpose(0, 2, 3, 1))
        wide = wide.view(np.uint8).reshape(panels, out.shape[1], -1)
        out[:, :, start : start + wide.shape[2]] = wide
        start += wide.shape[2]


def split_planes(packed: Bytes, blocks: int, upper: Bytes, lower: Bytes) -> None:
    """8-bit panels [panels, blocks x 512] in two planes: ``upper`` [panels, blocks x 384], ``lower`` [panels, blocks x 128]."""
    vectors = packed.reshape(len(packed), blocks, 2, 4, 64)  # half, vector, lane
    body = upper.reshape(len(packed), blocks, 384)
    six = vectors >> LOWER_BITS
    body[:, :, :256] = ((six[:, :, 0] & 15) | (six[:, :, 1] << 4)).reshape(len(packed), blocks, 256)
    body[:, :, 256:] = _pairs(six >> 4).reshape(len(packed), blocks, 128)
    lower.reshape(len(packed), blocks, 128)[:] = _pairs(vectors & 3).reshape(len(packed), blocks, 128)


def _pairs(bits):
    """Two bits each of vectors [.., half, 4, lane] -> bytes [.., half, lane]."""
    packed = bits[..., 0, :].copy()
    for part in range(1, 4):
        packed |= bits[..., part, :] << (2 * part)
    return packed


def _lanes(words):
    """[panel, row, block, word] -> [panel, block, word, row]: one lane a row."""
    return np.ascontiguousarray(words.transpose(0, 2, 3, 1)).view(np.uint8)


def _high_bits(form, high):
    """The bits above the second or fourth, [panel, row, block, vector, 4] -> [panel, block, bytes]."""
    high = high.transpose(0, 2, 3, 1, 4)  # panel, block, vector, row, byte
    panels, blocks = high.shape[:2]
    if form.bits in (3, 5):
        flat = np.ascontiguousarray(high).reshape(panels, blocks, 512)
        return np.packbits(flat, axis=-1, bitorder="little")
    return _pairs(high.reshape(panels, blocks, 2, 4, ROWS * 4)).reshape(panels, blocks, 128)


def _blocks(raw, size):
    return raw.reshape(len(raw), -1, size)


def _half(field):
    """Bytes of float16 fields as uint16."""
    return np.ascontiguousarray(field).view(np.uint16)


def _split_4(raw, in_features):
    """Q4_0 and IQ4_NL (2 + 16 bytes), Q4_1 (4 + 16): nibbles are in panel order already."""
    size = raw.shape[1] * BLOCK // in_features
    blocks = _blocks(raw, size)
    head = _half(blocks[:, :, : size - 16])
    return np.ascontiguousarray(blocks[:, :, size - 16 :]), None, [head]


def _split_5(raw, in_features):
    """Q5_0 (2 + 4 + 16 bytes) and Q5_1 (4 + 4 + 16): bit j of the middle word is weight j's fifth bit."""
    size = raw.shape[1] * BLOCK // in_features
    blocks = _blocks(raw, size)
    head = _half(blocks[:, :, : size - 20])
    high = np.unpackbits(blocks[:, :, size - 20 : size - 16], axis=-1, bitorder="little")
    return np.ascontiguousarray(blocks[:, :, size - 16 :]), high, [head]


def _split_8(raw, in_features):
    """Q8_0 (2 + 32 bytes): signed bytes become unsigned around 128."""
    blocks = _blocks(raw, 34)
    return blocks[:, :, 2:] ^ np.uint8(0x80), None, [_half(blocks[:, :, :2])]


def _six_bit_scales(packed):
    """12 bytes of Q4_K/Q5_K: eight 6-bit scales and minima -> two uint8 [..., 8]."""
    low, middle, high = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=-1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=-1)
    return scales, minima


def _super_groups(blocks):
    scales, minima = _six_bit_scales(blocks[:, :, 4:16])
    return [_half(blocks[:, :, :4]), np.stack([scales, minima], axis=-1)]


def _nibbles_k(quants):
    """Bytes [n, super, 128] of Q4_K/Q5_K -> weights' low nibbles [n, super, 8, 32]."""
    chunks = quants.reshape(*quants.shape[:2], 4, 1, 32)
    return np.concatenate([chunks & 15, chunks >> 4], axis=3).reshape(*quants.shape[:2], 8, 32)


def _join_nibbles(q):
    """Weights 0..15 in the low nibbles, 16..31 in the high ones: uint8 [..., 32] -> [..., 16]."""
    return np.ascontiguousarray((q[..., :16] & 15) | (q[..., 16:] << 4))


def _split_4k(raw, in_features):
    """Q4_K: 144 bytes a super-block of 256."""
    blocks = _blocks(raw, 144)
    return _join_nibbles(_nibbles_k(blocks[:, :, 16:])), None, _super_groups(blocks)


def _split_5k(raw, in_features):
    """Q5_K: 176 bytes a super-block; bit s of the 32 high bytes belongs to sub-block s."""
    blocks = _blocks(raw, 176)
    low = _nibbles_k(blocks[:, :, 48:])
    shifts = np.arange(8, dtype=np.uint8).reshape(8, 1)
    high = (blocks[:, :, None, 16:48] >> shifts) & 1
    return _join_nibbles(low), np.ascontiguousarray(high), _super_groups(blocks)


def _split_6k(raw, in_features):
    """Q6_K: 210 bytes a super-block: 128 low nibbles, 64 high pairs, 16 signed scales, d."""
    blocks = _blocks(raw, 210)
    n, count = blocks.shape[:2]
    low = blocks[:, :, :128].reshape(n, count, 2, 2, 32)  # half, first or second 32 bytes
    low = np.stack(
        [low[:, :, :, 0] & 15, low[:, :, :, 1] & 15, low[:, :, :, 0] >> 4, low[:, :, :, 1] >> 4], axis=3
    )
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(4, 1)
    high = (blocks[:, :, 128:192].reshape(n, count, 2, 1, 32) >> shifts) & 3
    groups = [_half(blocks[:, :, 208:210]), np.ascontiguousarray(blocks[:, :, 192:208])]
    return _join_nibbles(low.reshape(n, count, 8, 32)), np.ascontiguousarray(high), groups


def _two_bits(quants):
    """Bytes [n, super, 64] of Q2_K/Q3_K -> weights [n, super, 8, 32]: each run of 32 bytes holds four sub-blocks."""
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(4, 1)
    runs = quants.reshape(*quants.shape[:2], 2, 1, 32)
    return ((runs >> shifts) & 3).reshape(*quants.shape[:2], 8, 32)


def _join_pairs(q):
    """Four vectors of four weights into one word each time: uint8 [..., 32] -> [..., 8]."""
    parts = q.reshape(*q.shape[:-1], 2, 4, 4)
    joined = parts[..., 0, :] | parts[..., 1, :] << 2 | parts[..., 2, :] << 4 | parts[..., 3, :] << 6
    return np.ascontiguousarray(joined.reshape(*q.shape[:-1], 8))


def _split_2k(raw, in_features):
    """Q2_K: 84 bytes a super-block: 16 nibbles of scale and minimum, 64 pairs of bits, d and dmin."""
    blocks = _blocks(raw, 84)
    small = blocks[:, :, :16]
    groups = [_half(blocks[:, :, 80:84]), small & np.uint8(15), small >> np.uint8(4)]
    return _join_pairs(_two_bits(blocks[:, :, 16:80])), None, groups


def _split_3k(raw, in_features):
    """Q3_K: 110 bytes a super-block: 32 third bits as the fifth ones of Q5_K, 64 pairs of bits, 12 of scales, d."""
    blocks = _blocks(raw, 110)
    shifts = np.arange(8, dtype=np.uint8).reshape(8, 1)
    high = (blocks[:, :, None, :32] >> shifts) & 1
    low, above = blocks[:, :, 96:104], blocks[:, :, 104:108]
    scales = np.concatenate([low & 15, low >> 4], axis=-1)
    scales |= np.concatenate([(above >> shift & 3) << 4 for shift in (0, 2, 4, 6)], axis=-1)
    groups = [_half(blocks[:, :, 108:110]), scales - np.uint8(32)]  # signed bytes
    return _join_pairs(_two_bits(blocks[:, :, 32:96])), np.ascontiguousarray(high), groups


def _split_4xs(raw, in_features):
    """IQ4_XS: 136 bytes a super-block: d, 16 bits and 4 bytes of scales, nibbles in panel order."""
    blocks = _blocks(raw, 136)
    above, low = blocks[:, :, 2:4], blocks[:, :, 4:8]
    shape = (*blocks.shape[:2], 8)
    scales = np.stack([low & 15, low >> 4], axis=-1).reshape(shape)
    scales |= np.stack([(above >> shift & 3) << 4 for shift in (0, 2, 4, 6)], axis=-1).reshape(shape)
    groups = [_half(blocks[:, :, :2]), scales - np.uint8(32)]  # signed bytes
    return np.ascontiguousarray(blocks[:, :, 8:]), None, groups


def pack_dense(dtype: str, raw: Bytes, weights: Bytes) -> None:
    """Rows of plain numbers into panels: [panel, k, row], bfloat16 as [panel, k / 2, row, 2].

    ``raw`` uint8 [rows, row bytes] with rows a multiple of 16; ``weights`` uint8 [rows / 16, ...] is written.
    """
    panels = len(raw) // ROWS
    item = np.uint16 if dtype == "F16" else np.uint32  # a bfloat16 pair moves as one word
    rows = np.ascontiguousarray(raw).view(item).reshape(panels, ROWS, -1)
    weights[:] = np.ascontiguousarray(rows.transpose(0, 2, 1)).view(np.uint8).reshape(panels, -1)
