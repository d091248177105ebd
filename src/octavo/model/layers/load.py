"""One tensor the loader must fill, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.model.blocks import Part
from octavo.model.quantization.mxfp4 import BLOCK as MXFP4_BLOCK

QUANTIZE_ELEMENTS = 1 << 22  # quantized at a time: 16 MiB of float32 beside the weight


@dataclass(frozen=True)
class Cut:
    """This rank's slice of a stored tensor: ``size`` entries of dimension ``dim`` from ``start`` on, of ``total``."""

    dim: int
    start: int
    size: int
    total: int


@dataclass
class LoadItem:
    """``target`` is a view into a parameter; ``hf`` and ``gguf`` name its source.

    ``part`` says how its rows are stored (None = as they are). ``offset`` is added to Hugging Face norm weights (GGUF
    stores the sum). ``constant`` is what a random model gets instead of noise. ``cut`` is the part of the stored tensor
    that belongs here (None = all of it).

    ``store(rows, values)`` quantizes float32 values on the way in, rows of a stack counted through; ``target`` then says the
    shape alone, and may be a meta tensor beside ``home``, the tensor that is filled.
    ``scales`` names the scales that belong to ``hf`` where that is stored as MXFP4 blocks.
    ``ways``: the lists of items that fill ``target`` together, one for each way in which files hold it; an item whose
    name is "" is in no file of that format. The first way whose names all exist is taken.
    """

    hf: str
    gguf: str
    target: Tensor
    part: Part | None = None
    offset: float = 0.0
    constant: float | None = None
    cut: Cut | None = None
    scales: str = ""
    store: Callable[[slice, Tensor], None] | None = None
    home: Tensor | None = None
    ways: tuple[tuple[LoadItem, ...], ...] = ()

    @property
    def device(self) -> torch.device:
        """Where its values end up."""
        return (self.target if self.home is None else self.home).device

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        tensor = self.target if self.home is None else self.home
        return tensor.numel() * tensor.element_size()

    def stored_shape(self, gguf: bool) -> tuple[int, ...]:
        """The shape the source must have."""
        shape = list(self.target.shape)
        if self.cut is not None:
            shape[self.cut.dim] = self.cut.total
        if self.scales:
            shape[-1:] = [shape[-1] // MXFP4_BLOCK, MXFP4_BLOCK // 2]
            return tuple(shape)
        transposed = self.part is not None and self.part.stored in ("transposed", "alternating_columns")
        if transposed and not gguf and len(shape) > 1:
            shape[-2:] = shape[:-3:-1]
        return tuple(shape)

    def blocks(self) -> list[tuple[int, slice]]:
        """Runs of rows of a quantized target that are filled at a time: (matrix of a stack, its rows)."""
        *stack, rows, size = self.target.shape
        step = max(1, QUANTIZE_ELEMENTS // size)
        return [
            (index, slice(start, min(start + step, rows)))
            for index in range(stack[0] if stack else 1)
            for start in range(0, rows, step)
        ]

    def fill(self, values: Tensor) -> None:
        """Set the target to ``values`` [its shape], of any type and device."""
        if self.store is None:
            self.target.copy_(values)
            return
        stacked = values if values.dim() == 3 else values.unsqueeze(0)
        for index, rows in self.blocks():
            self.fill_rows(index, rows, stacked[index, rows])

    def fill_rows(self, index: int, rows: slice, values: Tensor) -> None:
        """Quantize ``values`` into these rows of a matrix of a target that has ``store``."""
        if self.store is None:
            raise ValueError("only quantized targets are filled by rows")
        first = index * self.target.shape[-2]
        # Moved before it is widened: half the bytes, and the device does the arithmetic.
        wide = values.to(self.device).to(torch.float32)
        self.store(slice(first + rows.start, first + rows.stop), wide)


@dataclass(frozen=True)
class Source:
    """A stored tensor by its full name; ``key`` is what its taker calls it."""

    key: str
    name: str
    required: bool = True


@dataclass
class StoredMatrix(LoadItem):
    """Some rows of a matrix that files hold quantized, in several tensors; ``target`` says the shape alone.

    ``take(stored)`` gets them by the keys of ``sources`` and checks and keeps them; ``randomize`` draws random ones.
    """

    sources: tuple[Source, ...] = ()
    take: Callable[[Mapping[str, Tensor]], None] = lambda stored: None
    randomize: Callable[[torch.Generator], None] = lambda generator: None
