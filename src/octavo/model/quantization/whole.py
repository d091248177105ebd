"""What a quantized matrix stands for, as numbers: for the few that are multiplied from both sides."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.device.ops.fp8 import GROUP
from octavo.device.ops.packed import unpack
from octavo.model.quantization.base import Weight
from octavo.model.quantization.bytes import ByteWeight
from octavo.model.quantization.dense import DenseWeight
from octavo.model.quantization.fp8 import BlockFp8Weight
from octavo.model.quantization.packed import PackedWeight


def whole(weight: Weight) -> Tensor:
    """The matrix [N, K], float32 where it is quantized; raises ``TypeError`` for a kind that nobody taught this."""
    if isinstance(weight, DenseWeight):
        return weight.matrix
    if isinstance(weight, ByteWeight):
        return weight.matrix.float() * weight.scale[:, None]
    if isinstance(weight, BlockFp8Weight):
        return weight.matrix.float() * weight.scale.t().repeat_interleave(GROUP, 1)
    if isinstance(weight, PackedWeight):
        found, order = unpack(weight.packed), weight.packed.order
        return found if order is None else found[:, torch.argsort(order)]
    raise TypeError(f"a {type(weight).__name__} has no whole")
