"""Matrices of fp8, 4 bits of exponent and 3 of mantissa: quantized while they are loaded, or stored so.

On load every output gets a scale with which its largest value is exact. Stored ones have a scale each, one for each output
(see ``bytes``), or one for each block of 128 x 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from octavo.device.kernels.rows import Fp8Rows, Raw
from octavo.device.ops.fp8 import FP8, GROUP, LINEAR_FP8, LINEAR_FP8_BLOCK, quantize_rows, takes_rows
from octavo.errors import UsageError
from octavo.model.blocks import Part
from octavo.model.layers.load import Cut, LoadItem
from octavo.model.layers.order import stored_rows
from octavo.model.quantization.bytes import ByteWeight, StoredByteWeight, stored_item, take_rows
from octavo.model.quantization.packed import shaped

if TYPE_CHECKING:
    from octavo.model.layers.build import Build


class Fp8Weight(ByteWeight):
    """See ``ByteWeight``."""

    kind = FP8
    op = LINEAR_FP8

    def __init__(self, out_features: int, in_features: int, build: Build) -> None:
        super().__init__(out_features, in_features, build)
        self.device_kind = build.spec.device

    def multiply(self, x: Tensor | Fp8Rows, bias: Tensor | None) -> Tensor:
        """See ``Weight``; rows that are quantized already are taken too."""
        out: Tensor = self.linear(x, self.matrix, self.scale, bias)
        return out

    def raw(self, x: Tensor | Fp8Rows) -> Tensor | Raw:
        """The product without its scales, where leaving them to what follows saves a pass."""
        out: Tensor | Raw = self.linear(x, self.matrix, self.scale, None, True)
        return out

    def takes_rows(self, tokens: int) -> bool:
        """Whether so many tokens are quantized before they are multiplied."""
        outputs, size = self.matrix.shape
        return takes_rows(outputs, size, tokens, self.device_kind)

    def quantize(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """See ``ByteWeight``."""
        return quantize_rows(values)


class StoredFp8Weight(StoredByteWeight, Fp8Weight):
    """See ``StoredByteWeight``."""


class BlockFp8Weight:
    """A tensor [N, K] of fp8, and float32 scales [K / 128, N]: those of blocks, repeated for their outputs.

    So outputs may be cut and put side by side anywhere; it costs 3 % of the bytes. ``scale_name`` is what files call them.
    """

    scale_name: ClassVar[str] = "weight_scale_inv"

    def __init__(self, out_features: int, in_features: int, build: Build) -> None:
        if in_features % GROUP:
            raise UsageError(
                f"Block-scaled fp8 weights: {in_features} inputs are no whole blocks of {GROUP}.",
                "Choose a smaller tensor parallel size.",
            )
        self.matrix = build.empty(out_features, in_features, dtype=FP8)
        self.scale = build.empty(in_features // GROUP, out_features, dtype=torch.float32)
        self.linear = build.binder.bind(LINEAR_FP8_BLOCK, build.spec)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See ``Weight``."""
        out: Tensor = self.linear(x, self.matrix, self.scale, bias)
        return out

    def item(self, hf: str, gguf: str, rows: slice, part: Part, cut: Cut | None) -> LoadItem:
        """See ``Weight``."""
        return stored_item(self, self.scale_name, hf, gguf, rows, part, cut)

    def take(self, first: int, part: Part, cut: Cut | None, stored: Mapping[str, Tensor]) -> None:
        """Copy this rank's rows and inputs; a block at the lower edge may hold fewer rows."""
        place = slice(first, first + part.out_features)
        matrix = shaped(stored, "weight", -1, -1, kind=FP8)
        blocks = [-(-size // GROUP) for size in matrix.shape]
        scale = shaped(stored, "scale", *blocks).float()
        rows = stored_rows(part, cut, gguf=False)
        if cut is not None and cut.dim == 1:
            if cut.start % GROUP:
                raise UsageError(
                    f"{part.hf}: {cut.size} inputs a device are no whole blocks of {GROUP}.",
                    "Choose a smaller tensor parallel size.",
                )
            matrix = matrix[:, cut.start : cut.start + cut.size]
            scale = scale[:, cut.start // GROUP : (cut.start + cut.size) // GROUP]
        self.matrix[place].copy_(take_rows(matrix, rows))
        self.scale[:, place].copy_(scale[rows // GROUP].t())

    def randomize(self, rows: slice, generator: torch.Generator) -> None:
        """Normal values of one scale."""
        inputs = self.matrix.shape[1]
        step = max(1, (1 << 22) // inputs)
        for start in range(rows.start, rows.stop, step):
            count = min(step, rows.stop - start)
            drawn = torch.empty((count, inputs), dtype=torch.float32, device=self.matrix.device)
            self.matrix[start : start + count].copy_(drawn.normal_(generator=generator).to(FP8))
        self.scale[:, rows] = inputs**-0.5


class CompressedBlockFp8Weight(BlockFp8Weight):
    """See ``BlockFp8Weight``; compressed-tensors has one name for all scales."""

    scale_name = "weight_scale"


class DeepseekBlockFp8Weight(BlockFp8Weight):
    """See ``BlockFp8Weight``; DeepSeek V4 writes exponents."""

    scale_name = "scale"
