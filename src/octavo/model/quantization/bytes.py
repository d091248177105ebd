"""Matrices of a byte a weight with a scale for each output: quantized while they are loaded, or stored so.

Stored matrices have a scale each or one for each output; both end up as one for each. Calibrated activation scales are not
used: activations get a scale a token from what they are, which is nearer to the unquantized product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from octavo.device.ops.bind import Op
from octavo.model.blocks import Part
from octavo.model.layers.load import Cut, LoadItem, Source, StoredMatrix
from octavo.model.layers.order import stored_rows
from octavo.model.quantization.packed import shaped

if TYPE_CHECKING:
    from octavo.model.layers.build import Build


class ByteWeight(ABC):
    """A tensor [N, K] of type ``kind``, and float32 scales [N]."""

    kind: ClassVar[torch.dtype]
    op: ClassVar[Op]

    def __init__(self, out_features: int, in_features: int, build: Build) -> None:
        self.matrix = build.empty(out_features, in_features, dtype=self.kind)
        self.scale = build.empty(out_features, dtype=torch.float32)
        self.linear = build.binder.bind(self.op, build.spec)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See ``Weight``."""
        out: Tensor = self.linear(x, self.matrix, self.scale, bias)
        return out

    def item(self, hf: str, gguf: str, rows: slice, part: Part, cut: Cut | None) -> LoadItem:
        """See ``Weight``; the loader quantizes into it, some rows at a time."""
        return LoadItem(hf, gguf, self.matrix[rows], part, cut=cut, store=partial(self.store, rows.start))

    @abstractmethod
    def quantize(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of float32 as bytes and scales."""

    def store(self, first: int, rows: slice, values: Tensor) -> None:
        """Quantize float32 values into rows, counted from ``first`` on."""
        place = slice(first + rows.start, first + rows.stop)
        matrix, scale = self.quantize(values)
        self.matrix[place].copy_(matrix)
        self.scale[place].copy_(scale)


class StoredByteWeight(ByteWeight):
    """Read as it is stored."""

    def item(self, hf: str, gguf: str, rows: slice, part: Part, cut: Cut | None) -> LoadItem:
        """See ``Weight``."""
        return stored_item(self, "weight_scale", hf, gguf, rows, part, cut)

    def take(self, first: int, part: Part, cut: Cut | None, stored: Mapping[str, Tensor]) -> None:
        """Copy this rank's rows and inputs; a scale of the whole matrix is repeated."""
        place = slice(first, first + part.out_features)
        matrix = shaped(stored, "weight", -1, -1, kind=self.kind)
        rows = stored_rows(part, cut, gguf=False)
        scale = stored["scale"].float().reshape(-1)
        if scale.numel() != 1:
            scale = shaped({"scale": scale}, "scale", matrix.shape[0])[rows]
        if cut is not None and cut.dim == 1:
            matrix = matrix[:, cut.start : cut.start + cut.size]
        self.matrix[place].copy_(take_rows(matrix, rows))
        self.scale[place].copy_(scale.expand(part.out_features))

    def randomize(self, rows: slice, generator: torch.Generator) -> None:
        """Normal values through the quantizer, some rows at a time."""
        outputs, inputs = self.matrix[rows].shape
        step = max(1, (1 << 22) // inputs)
        for start in range(0, outputs, step):
            count = min(step, outputs - start)
            drawn = torch.empty((count, inputs), dtype=torch.float32, device=self.matrix.device)
            self.store(
                rows.start,
                slice(start, start + count),
                drawn.normal_(0.0, inputs**-0.5, generator=generator),
            )


class StoredBytes(Protocol):
    """A matrix of bytes that files hold so, with scales beside it."""

    matrix: Tensor

    def take(self, first: int, part: Part, cut: Cut | None, stored: Mapping[str, Tensor]) -> None:
        """Fill rows from ``first`` on from "weight" and "scale"."""

    def randomize(self, rows: slice, generator: torch.Generator) -> None:
        """Draw random ones."""


def stored_item(
    weight: StoredBytes, scale: str, hf: str, gguf: str, rows: slice, part: Part, cut: Cut | None
) -> StoredMatrix:
    """What the loader must fill for these rows; ``scale`` is what files call the scales."""
    name = hf.removesuffix(".weight")
    return StoredMatrix(
        hf,
        gguf,
        weight.matrix[rows],
        part,
        cut=cut,
        sources=(
            Source("weight", f"{name}.weight"),
            Source("scale", f"{name}.{scale}"),
            Source("input_scale", f"{name}.input_scale", required=False),
        ),
        take=partial(weight.take, rows.start, part, cut),
        randomize=partial(weight.randomize, rows),
    )


def take_rows(matrix: Tensor, rows: Tensor) -> Tensor:
    """Some rows of a matrix of bytes (indexing is not there for all types); a view where they follow each other."""
    first = int(rows[0])
    if torch.equal(rows, torch.arange(first, first + len(rows))):
        return matrix[first : first + len(rows)]
    return matrix.view(torch.uint8)[rows].view(matrix.dtype)
