"""One tensor the loader must fill, and how."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.device.ops.fp8 import quantize_rows
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

    ``row_scale`` [rows]: ``target`` is fp8, quantized on the way in, each row with a scale of its own.
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
    row_scale: Tensor | None = None
    ways: tuple[tuple[LoadItem, ...], ...] = ()

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

    def blocks(self) -> list[slice]:
        """Runs of rows of a quantized target that are filled at a time."""
        rows, size = self.target.shape
        step = max(1, QUANTIZE_ELEMENTS // size)
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def fill(self, values: Tensor) -> None:
        """Set the target to ``values`` [its shape], of any type and device."""
        if self.row_scale is None:
            self.target.copy_(values)
            return
        for rows in self.blocks():
            self.fill_rows(rows, values[rows])

    def fill_rows(self, rows: slice, values: Tensor) -> None:
        """Quantize ``values`` into these rows of a target that has ``row_scale``."""
        if self.row_scale is None:
            raise ValueError("only quantized targets are filled by rows")
        # Moved before it is widened: half the bytes, and the device does the arithmetic.
        quantized, scale = quantize_rows(values.to(self.target.device).to(torch.float32))
        self.target[rows].copy_(quantized)
        self.row_scale[rows].copy_(scale)
