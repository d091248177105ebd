"""RMSNorm, with or without the residual addition."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.device.ops.norm import ADD_RMS_NORM, RMS_NORM
from octavo.model.blocks import Norm
from octavo.model.layers.build import Build
from octavo.model.layers.load import LoadItem


class NormLayer:
    """Weights stay in float32: they are small, and Gemma's 1 + w does not survive bfloat16."""

    def __init__(self, block: Norm, build: Build, hf_prefix: str = "", gguf_prefix: str = "") -> None:
        self.block = block
        self.eps = block.eps
        self.weight = build.empty(block.size, dtype=torch.float32)
        self.plain = build.binder.bind(RMS_NORM, build.spec)
        self.adding = build.binder.bind(ADD_RMS_NORM, build.spec)
        self.names = (f"{hf_prefix}{block.hf}.weight", f"{gguf_prefix}{block.gguf}.weight")

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.plain(x, self.weight, self.eps)
        return out

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual += x in place; the norm of the sum."""
        out: Tensor = self.adding(x, residual, self.weight, self.eps)
        return out

    def items(self) -> list[LoadItem]:
        """What the loader must fill."""
        return [LoadItem(*self.names, self.weight, offset=self.block.offset, constant=1.0)]
