"""The linear map with both operands in 8-bit whole numbers (Dettmers et al. 2022, without its outliers)."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.device.ops.bind import Op, triton_rows

INT8_MAX = 127.0
SMALLEST = 1e-12  # largest magnitude assumed of a row of zeros, so that its scale can be divided by


def quantize_rows_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [R, K] as int8 [R, K] and float32 scales [R] with x ~ int8 * scale; the largest value of a row becomes 127.

    Values are divided in float32 and rounded to nearest even.
    """
    wide = x.float()
    scale = wide.abs().amax(dim=-1).clamp(min=SMALLEST) * (1 / INT8_MAX)
    return (wide / scale.unsqueeze(-1)).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] times (weight [N, K] int8, row n times scale [N]) transposed, plus bias [N]: [T, N] in x's type.

    The rows of x are quantized as ``quantize_rows_int8`` does (dynamic, one scale a token); sums are in float32, exact up to
    2^24 (GPU implementations: up to 2^31).
    """
    tokens, token_scale = quantize_rows_int8(x)
    y = (tokens.float() @ weight.float().t()) * token_scale.unsqueeze(-1) * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


LINEAR_INT8 = Op("linear_int8", linear_int8, triton_rows("bytes:LinearInt8", factory=True))
