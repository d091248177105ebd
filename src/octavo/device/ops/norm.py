"""RMSNorm, alone and fused with the residual addition (Zhang & Sennrich 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.device.ops.bind import Op, triton_rows


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., E] / rms(x) * weight [E], computed in float32, returned in x's type."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual [T, E] += x [T, E] (in place), then rms_norm(residual) in x's type."""
    residual.add_(x)
    return rms_norm(residual, weight, eps)


RMS_NORM = Op("rms_norm", rms_norm, triton_rows("norm:rms_norm", "rms_norm_hopper"))
ADD_RMS_NORM = Op("add_rms_norm", add_rms_norm, triton_rows("norm:add_rms_norm", "add_rms_norm_hopper"))
