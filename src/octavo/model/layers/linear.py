"""A fused projection: parts of the checkpoint side by side in one matrix, multiplied by one call."""

from __future__ import annotations

from torch import Tensor

from octavo.model.blocks import Linear, Part
from octavo.model.layers.build import Build, Ranks
from octavo.model.layers.load import Cut, LoadItem, Source, StoredMatrix


class LinearLayer:
    """y [T, out] = x [T, in] W^T + b, stored and computed by the build's weight format."""

    def __init__(self, block: Linear, build: Build, hf_prefix: str, gguf_prefix: str) -> None:
        self.block = block
        self.weight = build.weight_format.allocate(block, build, hf_prefix, gguf_prefix)
        self.bias = build.empty(block.out_features) if block.bias else None
        self.multiply = self.weight.multiply
        self.ranks = build.ranks
        self.reduce = build.ranks.reduce if block.shard == "row" and build.ranks.size > 1 else None
        self.names = [(hf_prefix + part.hf, gguf_prefix + part.gguf, part) for part in block.parts]

    def __call__(self, x: Tensor) -> Tensor:
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
