"""GGUF blocks kept quantized: the same codes and scales in the layout of ``ops.packed``, nothing rounded.

The blocks are drawn in ``gguf_blocks``, whose values these must agree with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from octavo.device.ops.packed import Layout
from octavo.files.dtypes import GGUF_TYPES_BY_NAME
from octavo.model.layers.load import Source
from octavo.model.quantization.packed import Rows, shaped

LAYOUTS: dict[str, Layout] = {
    "Q2_K": Layout(2, 0, 16, 16, scales="k4"),
    "Q3_K": Layout(2, 1, 16, 16, scales="bytes", offset=4),
    "Q4_0": Layout(4, 0, 32, 32),
    "Q4_1": Layout(4, 0, 32, 32, scales="minimum"),
    "Q5_0": Layout(4, 1, 32, 32, offset=16),
    "Q5_1": Layout(4, 1, 32, 32, scales="minimum"),
    "Q8_0": Layout(8, 0, 32, 32, offset=128),
    "Q4_K": Layout(4, 0, 32, 32, scales="k"),
    "Q5_K": Layout(4, 1, 32, 32, scales="k"),
    "Q6_K": Layout(4, 2, 16, 16, scales="bytes", offset=32),
    "IQ4_NL": Layout(4, 0, 32, 32, code="iq4"),
    "IQ4_XS": Layout(4, 0, 32, 32, code="iq4", scales="bytes"),
    "MXFP4": Layout(4, 0, 32, 32, code="e2m1", half=torch.bfloat16),
}


@dataclass(frozen=True)
class GgufCodes:
    """See ``Codes``; ``kind`` is a block type."""

    kind: str

    def layout(self, inputs: int) -> Layout:
        """See ``Codes``."""
        return LAYOUTS[self.kind]

    def sources(self, hf: str, gguf: str) -> tuple[Source, ...]:
        """See ``Codes``."""
        return (Source("blocks", f"{gguf}.weight"),)

    def order(self, stored: Mapping[str, Tensor], inputs: int) -> Tensor | None:
        """See ``Codes``."""
        return None

    def read(self, stored: Mapping[str, Tensor], rows: Tensor, inputs: int) -> Rows:
        """See ``Codes``."""
        kind = GGUF_TYPES_BY_NAME[self.kind][1]
        blocks = shaped(stored, "blocks", -1, inputs // kind.block * kind.nbytes, kind=torch.uint8)
        raw = blocks[rows.to(blocks.device)].to(rows.device)
        blocks = raw.view(len(rows), -1, kind.nbytes)
        read = READERS.get(self.kind)
        return read(blocks) if read is not None else _small(blocks, self.kind)


def _halves(blocks: Tensor, count: int) -> Tensor:
    """The ``count`` fp16 numbers at the beginning of every block [n, blocks, count]."""
    return blocks[..., : 2 * count].contiguous().view(torch.float16)


def _bits(words: Tensor) -> Tensor:
    """Bytes [.., k] as their bits [.., 8 k], lowest first."""
    return (words.unsqueeze(-1) >> torch.arange(8, device=words.device, dtype=torch.uint8) & 1).flatten(-2)


def _small(blocks: Tensor, kind: str) -> Rows:
    """Blocks of 32 with a scale, and a minimum in Q4_1 and Q5_1; five-bit types keep the fifth bits before the nibbles."""
    rows = len(blocks)
    count = 2 if kind in ("Q4_1", "Q5_1") else 1
    scale = _halves(blocks, count)
    # They add the minimum that our layout takes off.
    scale = torch.stack((scale[..., 0], -scale[..., 1]), -1) if count == 2 else scale.view(rows, -1)
    body = blocks[..., 2 * count :]
    if kind == "Q8_0":
        return Rows((body ^ 128).reshape(rows, -1), scale)  # signed bytes + 128
    packed = body[..., -16:]
    codes = torch.cat((packed & 15, packed >> 4), dim=-1)
    if kind.startswith("Q5"):
        codes = codes | (_bits(body[..., :4]) << 4)
    return Rows(codes.reshape(rows, -1), scale)


def _mxfp4(blocks: Tensor) -> Rows:
    """Exponents become bfloat16 numbers; the smallest, 2^-127, is a subnormal one."""
    exponents = blocks[..., 0].to(torch.int16) << 7
    scale = torch.where(exponents == 0, 64, exponents).to(torch.int16).view(torch.bfloat16)
    packed = blocks[..., 1:]
    return Rows(torch.cat((packed & 15, packed >> 4), dim=-1).reshape(len(blocks), -1), scale)


def _shifted(packed: Tensor, shifts: Sequence[int], mask: int) -> Tensor:
    """Fields of bytes [.., k] at each shift, one after the other [.., shifts, k]."""
    places = torch.tensor(shifts, device=packed.device, dtype=torch.uint8).view(-1, 1)
    return packed.unsqueeze(-2) >> places & mask


def _two_bits(packed: Tensor) -> Tensor:
    """64 bytes of a block as 256 codes: each run of 32 bytes holds four sub-blocks of 32, lowest bits first."""
    return _shifted(packed.reshape(*packed.shape[:-1], 2, 32), (0, 2, 4, 6), 3).flatten(-3)


def _outer(half: Tensor) -> Tensor:
    """An fp16 number [n, blocks] alone in a word of outer scales."""
    return torch.stack((half, torch.zeros_like(half)), dim=-1)


def _q2_k(blocks: Tensor) -> Rows:
    """16 bytes of scales and minimums, as the layout wants them | 64 bytes of codes | half d | half dm."""
    rows = len(blocks)
    codes = _two_bits(blocks[..., 16:80]).reshape(rows, -1)
    outer = blocks[..., 80:84].contiguous().view(torch.float16)
    return Rows(codes, blocks[..., :16].reshape(rows, -1), outer)


def _q3_k(blocks: Tensor) -> Rows:
    """32 bytes, whose bit j is element i's third bit in sub-block j | 64 bytes of codes | 12 of scales | half d."""
    rows = len(blocks)
    high = _shifted(blocks[..., :32], range(8), 1).flatten(-2)
    codes = (_two_bits(blocks[..., 32:96]) | high << 2).reshape(rows, -1)
    low = _shifted(blocks[..., 96:104], (0, 4), 15).flatten(-2)
    scale = low | _shifted(blocks[..., 104:108], (0, 2, 4, 6), 3).flatten(-2) << 4
    d = blocks[..., 108:110].contiguous().view(torch.float16).squeeze(-1)
    return Rows(codes, (scale.to(torch.int8) - 32).reshape(rows, -1), _outer(d))


def _iq4_xs(blocks: Tensor) -> Rows:
    """half d | 16 bits of high pairs of scales | 4 bytes of their low nibbles | 128 bytes of nibbles, by 32 codes."""
    rows = len(blocks)
    low = torch.stack((blocks[..., 4:8] & 15, blocks[..., 4:8] >> 4), dim=-1).flatten(-2)
    high = torch.stack([blocks[..., 2:4] >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)
    packed = blocks[..., 8:].reshape(rows, -1, 8, 16)
    codes = torch.cat((packed & 15, packed >> 4), dim=-1).reshape(rows, -1)
    scale = ((low | high << 4).to(torch.int8) - 32).reshape(rows, -1)
    return Rows(codes, scale, _outer(_halves(blocks, 1).squeeze(-1)))


def _k(blocks: Tensor, fifth: bool = False) -> Rows:
    """Q4_K and Q5_K: two levels of scales and minimums; see ``gguf_blocks.unpack_k_scales``."""
    rows = len(blocks)
    first, second, third = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=-1)
    minimums = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=-1)
    runs = blocks[..., -128:].reshape(rows, -1, 4, 1, 32)
    codes = torch.cat((runs & 15, runs >> 4), dim=-2).reshape(rows, -1, 8, 32)
    if fifth:
        place = torch.arange(8, device=blocks.device, dtype=torch.uint8).view(8, 1)
        codes = codes | ((blocks[..., None, 16:48] >> place & 1) << 4)
    small = torch.stack((scales, minimums), dim=-1).reshape(rows, -1, 2)
    return Rows(codes.reshape(rows, -1), small, _halves(blocks, 2))


def _q6_k(blocks: Tensor) -> Rows:
    """Two levels of scales; see ``gguf_blocks`` for where the bits are."""
    rows = len(blocks)
    low = blocks[..., :128].reshape(rows, -1, 2, 1, 64)
    low = torch.cat((low & 15, low >> 4), dim=-2).reshape(rows, -1, 2, 4, 32)
    pairs = torch.tensor([0, 2, 4, 6], device=blocks.device, dtype=torch.uint8).view(4, 1)
    high = blocks[..., 128:192].reshape(rows, -1, 2, 1, 32) >> pairs & 3
    codes = (low | (high << 4)).reshape(rows, -1)
    d = blocks[..., 208:210].contiguous().view(torch.float16).squeeze(-1)
    scale = blocks[..., 192:208].contiguous().view(torch.int8).reshape(rows, -1)
    return Rows(codes, scale, _outer(d))


READERS: dict[str, Callable[[Tensor], Rows]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _k,
    "Q5_K": partial(_k, fifth=True),
    "Q6_K": _q6_k,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
