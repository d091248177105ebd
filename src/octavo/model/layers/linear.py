"""A fused projection: parts of the checkpoint side by side in one matrix, multiplied by one call."""

from __future__ import annotations

from torch import Tensor

from octavo.model.blocks import Linear
from octavo.model.layers.build import Build
from octavo.model.layers.load import LoadItem


class LinearLayer:
    """y [T, out] = x [T, in] W^T + b, stored and computed by the build's weight format."""

    def __init__(self, block: Linear, build: Build, hf_prefix: str, gguf_prefix: str) -> None:
        self.block = block
        self.weight = build.empty(block.out_features, block.in_features)
        self.bias = build.empty(block.out_features) if block.bias else None
        self.multiply = build.linear
        self.names = [(hf_prefix + part.hf, gguf_prefix + part.gguf, part) for part in block.parts]

    def __call__(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.weight, self.bias)

    def items(self) -> list[LoadItem]:
        """What the loader must fill, part by part."""
        found, row = [], 0
        for hf, gguf, part in self.names:
            rows = slice(row, row + part.out_features)
            found.append(LoadItem(f"{hf}.weight", f"{gguf}.weight", self.weight[rows], heads=part.heads))
            if self.bias is not None:
                found.append(LoadItem(f"{hf}.bias", f"{gguf}.bias", self.bias[rows], heads=part.heads))
            row += part.out_features
        return found
