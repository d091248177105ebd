"""How a weight matrix is stored and multiplied: one seam between the layers and the formats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from octavo.model.blocks import Part
from octavo.model.layers.load import Cut, LoadItem

if TYPE_CHECKING:
    from octavo.model.layers.build import Build


class Weight(Protocol):
    """A matrix [N, K] on the device."""

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, K] times the matrix transposed, plus bias [N]: [T, N] in x's type."""

    def item(self, hf: str, gguf: str, rows: slice, part: Part, cut: Cut | None) -> LoadItem:
        """What the loader must fill for these rows of the matrix."""


class WeightFormat(Protocol):
    """Allocates matrices."""

    def allocate(self, out_features: int, in_features: int, build: Build) -> Weight:
        """A matrix, uninitialized."""
