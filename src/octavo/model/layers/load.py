"""One tensor the loader must fill, and how."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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

    ``heads`` > 0: GGUF may store the rows with rotary pairs interleaved. ``offset`` is added to Hugging Face norm
    weights (GGUF stores the sum). ``constant`` is what a random model gets instead of noise. ``cut`` is the part of the
    stored tensor that belongs here (None = all of it).
    """

    hf: str
    gguf: str
    target: Tensor
    heads: int = 0
    offset: float = 0.0
    constant: float | None = None
    cut: Cut | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape the source must have."""
        shape = list(self.target.shape)
        if self.cut is not None:
            shape[self.cut.dim] = self.cut.total
        return tuple(shape)
