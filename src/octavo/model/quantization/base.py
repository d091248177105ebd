"""How a weight matrix is stored and multiplied: one seam between the layers and the formats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

from torch import Tensor

from octavo.model.blocks import Experts, Linear, Part
from octavo.model.layers.load import Cut, LoadItem

if TYPE_CHECKING:
    from octavo.model.layers.build import Build
    from octavo.model.quantization.packed import LoadedPackedWeight, StoredPackedWeight


Stack: TypeAlias = "LoadedPackedWeight | StoredPackedWeight"  # the rows of many experts, packed


class Weight(Protocol):
    """A matrix [N, K] on the device."""

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, K] times the matrix transposed, plus bias [N]: [T, N] in x's type."""

    def item(self, hf: str, gguf: str, rows: slice, part: Part, cut: Cut | None) -> LoadItem:
        """What the loader must fill for these rows of the matrix."""


class WeightFormat(Protocol):
    """Allocates matrices. ``covers_head``: of the output head too, not of the layers alone."""

    @property
    def covers_head(self) -> bool:
        """See above."""

    @property
    def has_fp8(self) -> bool:
        """Whether some matrices are fp8 with a scale an output, whose activations norms may quantize."""

    def allocate(self, block: Linear, build: Build, hf_prefix: str = "", gguf_prefix: str = "") -> Weight:
        """The matrix of all parts, uninitialized; the prefixes come before the parts' names."""

    def allocate_experts(
        self, block: Experts, build: Build, hf_prefix: str, gguf_prefix: str
    ) -> tuple[Stack, Stack] | None:
        """Stacks [E * 2 I, H] and [E * H, I] of a layer's experts; None where they are stored as they are."""
