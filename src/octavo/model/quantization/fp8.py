"""Weights quantized to fp8 while they are loaded: one scale an output channel, the largest value of each is exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octavo.device.kernels.rows import Fp8Rows, Raw
from octavo.device.ops.bind import OpSpec
from octavo.device.ops.fp8 import FP8, LINEAR_FP8, MIN_CAPABILITY, takes_rows
from octavo.errors import UsageError
from octavo.model.blocks import DecoderSpec, MoE, Part
from octavo.model.layers.load import Cut, LoadItem
from octavo.model.quantization.base import WeightFormat
from octavo.model.quantization.dense import DENSE

if TYPE_CHECKING:
    from octavo.model.layers.build import Build


class Fp8Weight:
    """A tensor [N, K] of a byte a weight, and float32 scales [N]."""

    def __init__(self, out_features: int, in_features: int, build: Build) -> None:
        self.matrix = build.empty(out_features, in_features, dtype=FP8)
        self.scale = build.empty(out_features, dtype=torch.float32)
        self.linear = build.binder.bind(LINEAR_FP8, build.spec)
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

    def item(self, hf: str, gguf: str, rows: slice, part: Part, cut: Cut | None) -> LoadItem:
        """See ``Weight``; the loader quantizes into it, some rows at a time."""
        return LoadItem(hf, gguf, self.matrix[rows], part, cut=cut, row_scale=self.scale[rows])


@dataclass(frozen=True)
class Fp8Format:
    """See ``WeightFormat``."""

    def allocate(self, out_features: int, in_features: int, build: Build) -> Fp8Weight:
        """See ``WeightFormat``."""
        return Fp8Weight(out_features, in_features, build)


def choose_format(quantization: str | None, decoder: DecoderSpec, spec: OpSpec) -> WeightFormat:
    """The format of the decoder's projections that ``--quantization`` names (None: as they are).

    Raises ``UsageError`` for a name that is none, a device without fp8 arithmetic, and mixtures of experts.
    """
    if quantization is None:
        return DENSE
    if quantization != "fp8":
        raise UsageError(
            f"--quantization {quantization} is a format of the compiled CPU path alone.",
            "Use --quantization fp8 on a GPU.",
        )
    if spec.device == "cuda" and spec.capability < MIN_CAPABILITY:
        raise UsageError(
            "--quantization fp8 needs a GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell); this one has "
            f"{spec.capability // 10}.{spec.capability % 10}.",
            "Run without --quantization, or use a smaller model.",
        )
    if any(isinstance(layer.mlp, MoE) for layer in decoder.layers):
        raise UsageError(
            "--quantization fp8 does not cover mixtures of experts, whose experts hold nearly all weights.",
            "Run this model without --quantization.",
        )
    return Fp8Format()
