"""GGUF blocks kept quantized: the same codes and scales in the layout of ``ops.packed``, nothing rounded.

The blocks are drawn in ``gguf_blocks``, whose values these must agree with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.device.ops.packed import Layout
from octavo.files.dtypes import GGUF_TYPES_BY_NAME
from octavo.model.layers.load import Source
from octavo.model.quantization.packed import Rows, shaped

LAYOUTS: dict[str, Layout] = {
    "Q4_0": Layout(4, 0, 32, 32),
    "Q4_1": Layout(4, 0, 32, 32, scales="minimum"),
    "Q5_0": Layout(4, 1, 32, 32, offset=16),
    "Q5_1": Layout(4, 1, 32, 32, scales="minimum"),
    "Q8_0": Layout(8, 0, 32, 32, offset=128),
    "Q4_K": Layout(4, 0, 32, 32, scales="k"),
    "Q5_K": Layout(4, 1, 32, 32, scales="k"),
    "Q6_K": Layout(4, 2, 16, 16, scales="bytes", offset=32),
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
        if kind.block == 256:
            return _q6_k(blocks) if self.kind == "Q6_K" else _k(blocks, fifth=self.kind == "Q5_K")
        return _small(blocks, self.kind)


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


def _k(blocks: Tensor, fifth: bool) -> Rows:
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
    outer = blocks[..., 208:210].contiguous().view(torch.float16)
    scale = blocks[..., 192:208].contiguous().view(torch.int8).reshape(rows, -1)
    return Rows(codes, scale, torch.cat((outer, torch.zeros_like(outer)), dim=-1))
