"""What the kernels of fp8 weights hand to each other: rows that are quantized already, products without their scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Most rows of a step whose kernels are all our own and start early (programmatic dependent launch): with more, products are
# the vendor's, which take no part in it.
FEW = 64
# Outputs from which the vendor's product is faster even for one token: widening takes the time, not reading.
WIDE = 16384
ALIGNMENT = 16  # of both sizes of a weight that the vendor's product takes


@dataclass(frozen=True)
class Fp8Rows:
    """Rows quantized by the op before: values [T, K] fp8 times scale [T]; ``one`` is the number 1 on the device."""

    values: Tensor
    scale: Tensor
    one: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """[T, K]."""
        return self.values.shape


@dataclass(frozen=True)
class Raw:
    """A product [T, N] whose scales the op that follows applies: values * token_scale [T] * scale [N], in ``dtype``."""

    values: Tensor
    token_scale: Tensor
    scale: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """[T, N]."""
        return self.values.shape

    def take(self, rows: Tensor | slice) -> Raw:
        """Some rows."""
        return Raw(self.values[rows], self.token_scale[rows], self.scale, self.dtype)

    def settled(self) -> Tensor:
        """The product itself."""
        return (self.values.float() * self.token_scale.unsqueeze(-1) * self.scale).to(self.dtype)
