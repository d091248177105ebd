"""A fused projection: parts of the checkpoint side by side in one matrix, multiplied by one call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from octavo.device.kernels.rows import Fp8Rows, Raw
from octavo.model.blocks import Linear, Part
from octavo.model.layers.build import Build, Ranks
from octavo.model.layers.load import Cut, LoadItem, Source, StoredMatrix
from octavo.model.quantization.fp8 import Fp8Weight


class LinearLayer:
    """y [T, out] = x [T, in] W^T + b, stored and computed by the build's weight format.

    Where that is fp8, x may be ``Fp8Rows``: quantized by the op that made it.
    """

    def __init__(self, block: Linear, build: Build, hf_prefix: str, gguf_prefix: str) -> None:
        self.block = block
        self.weight = build.weight_format.allocate(block, build, hf_prefix, gguf_prefix)
        self.bias = build.empty(block.out_features) if block.bias else None
        self.multiply = self.weight.multiply
        self.ranks = build.ranks
        self.reduce = build.ranks.reduce if block.shard == "row" and build.ranks.size > 1 else None
        self.names = [(hf_prefix + part.hf, gguf_prefix + part.gguf, part) for part in block.parts]

    @property
    def fp8(self) -> Fp8Weight | None:
        """The weight, where it is fp8 and nothing (a bias, a sum over ranks) follows its scales."""
        weight = self.weight if isinstance(self.weight, Fp8Weight) else None
        return weight if self.bias is None and self.reduce is None else None

    def branch(self, x: Tensor | Fp8Rows) -> Tensor | Raw:
        """The same, but its scales may be left to the op that follows."""
        weight = self.fp8
        return self(x) if weight is None else weight.raw(x)

    def __call__(self, x: Any) -> Tensor:
        if self.reduce is None:
            return self.multiply(x, self.bias)
        y = self.reduce(self.multiply(x, None))
        return y if self.bias is None else y + self.bias  # once, not once a rank

    def items(self) -> list[LoadItem]:
        """What the loader must fill, part by part."""
        found, row = [], 0
        for hf, gguf, part in self.names:
            rows = slice(row, row + part.out_features)
            item = self.weight.item(f"{hf}.weight", f"{gguf}.weight", rows, part, self._cut(part))
            found.append(item)
            if self.bias is None and isinstance(item, StoredMatrix):  # quantizers may add one of zeros
                item.sources += (Source("zero_bias", f"{hf}.bias", required=False),)
            if self.bias is not None:
                cut = self._cut(part) if self.block.shard != "row" else None
                found.append(LoadItem(f"{hf}.bias", f"{gguf}.bias", self.bias[rows], part, cut=cut))
            row += part.out_features
        return found

    def _cut(self, part: Part) -> Cut | None:
        """This rank's slice of the part's stored weight."""
        rank, size = self.ranks.rank, self.ranks.size
        rows = part.out_features
        if size > 1 and self.block.shard == "row":
            inputs = self.block.in_features
            return Cut(1, rank * inputs, inputs, size * inputs)
        if size > 1 and self.block.shard == "column":
            return cut_of(part, self.ranks)
        return Cut(0, part.start, rows, part.total) if part.total else None


def cut_of(part: Part, ranks: Ranks) -> Cut | None:
    """This rank's rows of a part that is split by rows (None: all that is stored)."""
    rows = part.out_features
    if ranks.size == 1:
        return Cut(0, part.start, rows, part.total) if part.total else None
    begin = part.start + ranks.rank // part.copies * rows
    return Cut(0, begin, rows, part.total or ranks.size // part.copies * rows)
