"""What a layer needs while it is built: type, device, and functions bound once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from octavo.device.ops.bind import Binder, OpSpec
from octavo.device.ops.linear import LINEAR
from octavo.model.blocks import Rope
from octavo.model.quantization.base import WeightFormat
from octavo.model.quantization.dense import DENSE


@dataclass(frozen=True)
class Ranks:
    """This rank of a tensor parallel group: ``reduce`` sums over the ranks, ``gather`` joins last dimensions in order.

    Both take and return tensors of the run type; both are needed where ``size`` > 1.
    """

    rank: int = 0
    size: int = 1
    reduce: Callable[[Tensor], Tensor] | None = None
    gather: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.size > 1 and (self.reduce is None or self.gather is None):
            raise ValueError("ranks of a group need reduce and gather")


ALONE = Ranks()


@dataclass(frozen=True)
class CacheType:
    """How keys and values are kept: in ``dtype`` (None: that of activations). ``calibrated``: the files hold scales."""

    dtype: torch.dtype | None = None
    calibrated: bool = False


AS_RUN = CacheType()


@dataclass
class Build:
    """The context of a build. ``tables`` shares cos/sin between layers with the same rope; ``weight_format`` is how
    projections are stored; ``shared`` holds what layers of one kind have in common."""

    dtype: torch.dtype
    device: torch.device
    binder: Binder
    spec: OpSpec
    max_position: int
    ranks: Ranks = ALONE
    weight_format: WeightFormat = DENSE
    tables: dict[Rope, Tensor] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    cache_type: CacheType = AS_RUN

    def dense(self) -> Build:
        """The same, with projections stored as they are."""
        return replace(self, weight_format=DENSE)

    @property
    def linear(self) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """The dense product for this device, bound anew for each layer that asks."""
        return self.binder.bind(LINEAR, self.spec)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialized parameter."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def cos_sin(self, rope: Rope) -> Tensor:
        """[max_position, dim] float32: cos of every position and frequency, then sin."""
        if rope not in self.tables:
            frequencies = torch.tensor(rope.frequencies(self.max_position), dtype=torch.float32)
            angles = torch.outer(torch.arange(self.max_position, dtype=torch.float32), frequencies)
            table = torch.cat((angles.cos(), angles.sin()), dim=1) * rope.scale
            self.tables[rope] = table.to(self.device)
        return self.tables[rope]
