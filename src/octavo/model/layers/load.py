"""One tensor the loader must fill, and how."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octavo.model.blocks import Part
from octavo.model.quantization.mxfp4 import BLOCK as MXFP4_BLOCK


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
