"""Weights as they are, in the run type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from octavo.model.blocks import Experts, Linear, Part
from octavo.model.layers.load import Cut, LoadItem

if TYPE_CHECKING:
    from octavo.model.layers.build import Build


class DenseWeight:
    """One tensor [N, K]."""

    def __init__(self, out_features: int, in_features: int, build: Build) -> None:
        self.matrix = build.empty(out_features, in_features)
        self.linear = build.linear

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See ``Weight``."""
        return self.linear(x, self.matrix, bias)

    def item(self, hf: str, gguf: str, rows: slice, part: Part, cut: Cut | None) -> LoadItem:
        """See ``Weight``."""
        return LoadItem(hf, gguf, self.matrix[rows], part, cut=cut)


@dataclass(frozen=True)
class DenseFormat:
    """See ``WeightFormat``."""

    covers_head: ClassVar[bool] = False
    has_fp8: ClassVar[bool] = False

    def allocate(
        self, block: Linear, build: Build, hf_prefix: str = "", gguf_prefix: str = ""
    ) -> DenseWeight:
        """See ``WeightFormat``."""
        return DenseWeight(block.out_features, block.in_features, build)

    def allocate_experts(self, block: Experts, build: Build, hf_prefix: str, gguf_prefix: str) -> None:
        """See ``WeightFormat``."""
        return


DENSE = DenseFormat()
