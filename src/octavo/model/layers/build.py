"""What a layer needs while it is built: type, device, and functions bound once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.device.ops.bind import Binder, OpSpec
from octavo.model.blocks import Rope


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in], weight [out, in], bias [out] or None -> [T, out]; the library's matrix product."""
    return F.linear(x, weight, bias)


@dataclass
class Build:
    """The context of a build. ``tables`` shares cos/sin between layers with the same rope."""

    dtype: torch.dtype
    device: torch.device
    binder: Binder
    spec: OpSpec
    max_position: int
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = dense_linear
    tables: dict[Rope, Tensor] = field(default_factory=dict)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialized parameter."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def cos_sin(self, rope: Rope) -> Tensor:
        """[max_position, dim] float32: cos of every position and frequency, then sin."""
        if rope not in self.tables:
            frequencies = torch.tensor(rope.inv_freq, dtype=torch.float32)
            angles = torch.outer(torch.arange(self.max_position, dtype=torch.float32), frequencies)
            table = torch.cat((angles.cos(), angles.sin()), dim=1) * rope.scale
            self.tables[rope] = table.to(self.device)
        return self.tables[rope]
