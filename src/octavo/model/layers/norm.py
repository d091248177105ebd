"""RMSNorm and LayerNorm, with or without the residual addition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from octavo.device.kernels.rows import Raw
from octavo.device.ops.fp8 import ADD_RMS_NORM_FP8
from octavo.device.ops.layer_norm import LAYER_NORM
from octavo.device.ops.norm import ADD_RMS_NORM, RMS_NORM
from octavo.model.blocks import Norm
from octavo.model.layers.build import Build
from octavo.model.layers.load import LoadItem
from octavo.model.quantization.fp8 import Fp8Weight


class NormLayer:
    """Weights stay in float32: they are small, and Gemma's 1 + w does not survive bfloat16."""

    def __init__(self, block: Norm, build: Build, hf_prefix: str = "", gguf_prefix: str = "") -> None:
        self.block = block
        self.eps = block.eps
        self.weight = build.empty(block.size, dtype=torch.float32)
        self.plain = build.binder.bind(RMS_NORM, build.spec)
        self.adding = build.binder.bind(ADD_RMS_NORM, build.spec)
        fp8 = build.weight_format.has_fp8
        self.adding_fp8 = build.binder.bind(ADD_RMS_NORM_FP8, build.spec) if fp8 else None
        self.next: Fp8Weight | None = None  # what multiplies the normed rows, where that is one fp8 weight
        self.names = (f"{hf_prefix}{block.hf}", f"{gguf_prefix}{block.gguf}")

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.plain(x, self.weight, self.eps)
        return out

    def add(self, x: Tensor | Raw, residual: Tensor) -> Any:
        """residual += x in place; the norm of the sum, quantized where the ``next`` weight wants it so."""
        if self.adding_fp8 is None:
            return self.adding(x, residual, self.weight, self.eps)
        quantize = self.next is not None and self.next.takes_rows(residual.shape[0])
        return self.adding_fp8(x, residual, self.weight, self.eps, quantize)

    def items(self) -> list[LoadItem]:
        """What the loader must fill."""
        hf, gguf = self.names
        return [
            LoadItem(f"{hf}.weight", f"{gguf}.weight", self.weight, offset=self.block.offset, constant=1.0)
        ]


class LayerNormLayer:
    """The same face; weight and bias are in the run type, as the vendor's kernel wants them."""

    def __init__(self, block: Norm, build: Build, hf_prefix: str = "", gguf_prefix: str = "") -> None:
        self.block = block
        self.weight = build.empty(block.size)
        self.bias = build.empty(block.size) if block.bias else None
        self.plain = build.binder.bind(LAYER_NORM, build.spec)
        self.names = (f"{hf_prefix}{block.hf}", f"{gguf_prefix}{block.gguf}")

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.plain(x, self.weight, self.bias, self.block.eps)
        return out

    def add(self, x: Any, residual: Tensor) -> Tensor:
        """residual += x in place; the norm of the sum."""
        return self(residual.add_(x))

    def items(self) -> list[LoadItem]:
        """What the loader must fill."""
        hf, gguf = self.names
        weight = LoadItem(
            f"{hf}.weight", f"{gguf}.weight", self.weight, offset=self.block.offset, constant=1.0
        )
        found = [weight]
        if self.bias is not None:
            found.append(LoadItem(f"{hf}.bias", f"{gguf}.bias", self.bias))
        return found


def make_norm(
    block: Norm, build: Build, hf_prefix: str = "", gguf_prefix: str = ""
) -> NormLayer | LayerNormLayer:
    """The layer for a block's kind."""
    kind = LayerNormLayer if block.kind == "layer" else NormLayer
    return kind(block, build, hf_prefix, gguf_prefix)
