"""The linear map with 8-bit floating point weights: 4 bits of exponent, 3 of mantissa (Micikevicius et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.device.ops.bind import Implementation, Op, OpSpec

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
MIN_CAPABILITY = 89  # tensor cores of older devices do not take fp8
SMALLEST = 1e-12  # largest magnitude assumed of a row of zeros, so that its scale can be divided by


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [R, K] as fp8 [R, K] and float32 scales [R] with x ~ fp8 * scale.

    scale = max |row| * (1 / 448), so that the largest value of a row becomes 448 and none overflows; values are divided
    in float32 and rounded to nearest even. A row with a NaN becomes NaN.
    """
    wide = x.float()
    scale = wide.abs().amax(dim=-1).clamp(min=SMALLEST) * (1 / FP8_MAX)
    return (wide / scale.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def linear_fp8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] times (weight [N, K] fp8, row n times scale [N]) transposed, plus bias [N]: [T, N] in x's type.

    The rows of x are quantized as ``quantize_rows`` does (dynamic, one scale a token); sums are in float32. GPU
    implementations may leave x as it is, which is nearer to the unquantized product: one token does so, because there
    the time goes into reading the weight. Alone and among others a token's results may therefore differ by x's
    rounding: 2^-4 of each value at most, about 0.026 of the result's norm on normal values.
    """
    tokens, token_scale = quantize_rows(x)
    y = (tokens.float() @ weight.float().t()) * token_scale.unsqueeze(-1) * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


GROUP = 128  # inputs that share a scale in block-scaled products


def linear_fp8_block(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] times (weight [N, K] fp8, 128 inputs of row n times scale [K / 128, N]) transposed, plus bias [N]
    (DeepSeek-AI 2024): [T, N] in x's type.

    128 inputs of a token are quantized together as ``quantize_rows`` does a row; sums are in float32. K is a multiple of 128.
    """
    tokens, size = x.shape
    values, token_scale = quantize_rows(x.reshape(-1, GROUP))
    wide = values.float() * token_scale.unsqueeze(-1)
    y = wide.view(tokens, size) @ (weight.float() * scale.t().repeat_interleave(GROUP, dim=1)).t()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _takes_fp8(spec: OpSpec) -> bool:
    return spec.device == "cuda" and spec.capability >= MIN_CAPABILITY


def _is_hopper(spec: OpSpec) -> bool:
    return spec.device == "cuda" and 90 <= spec.capability < 120


KERNELS = "octavo.device.kernels.triton.fp8:"
LINEAR_FP8 = Op(
    "linear_fp8",
    linear_fp8,
    (
        Implementation("triton-hopper", KERNELS + "linear_fp8_hopper", _is_hopper, "triton"),
        Implementation("triton", KERNELS + "linear_fp8", _takes_fp8, "triton"),
    ),
)
LINEAR_FP8_BLOCK = Op(
    "linear_fp8_block",
    linear_fp8_block,
    (
        Implementation(
            "triton", "octavo.device.kernels.triton.bytes:LinearFp8Block", _takes_fp8, "triton", factory=True
        ),
    ),
)
