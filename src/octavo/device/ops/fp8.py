"""The linear map with 8-bit floating point weights: 4 bits of exponent, 3 of mantissa (Micikevicius et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.device.kernels.rows import ALIGNMENT, WIDE, Fp8Rows, Raw
from octavo.device.ops.activation import act_mul
from octavo.device.ops.bind import Implementation, Op, OpSpec
from octavo.device.ops.norm import rms_norm

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


def settled(x: Tensor | Raw) -> Tensor:
    """A tensor, whatever it was."""
    return x.settled() if isinstance(x, Raw) else x


def rows_of(x: Tensor) -> Fp8Rows:
    """``quantize_rows`` as the ops hand it on."""
    values, scale = quantize_rows(x)
    return Fp8Rows(values, scale, torch.ones((), device=x.device), x.dtype)


def takes_rows(outputs: int, size: int, tokens: int, device: str) -> bool:
    """Whether ``linear_fp8`` quantizes so many tokens for a weight [outputs, size], so that the op before may do it.

    On GPUs one token is multiplied as it is, where the weight has fewer than ``WIDE`` rows: its time goes into reading
    them. Sizes that the vendor's product does not take are multiplied unquantized.
    """
    if device == "cpu":
        return True
    fits = outputs % ALIGNMENT == 0 and size % ALIGNMENT == 0
    return fits and (tokens > 1 or outputs >= WIDE)


def linear_fp8(
    x: Tensor | Fp8Rows, weight: Tensor, scale: Tensor, bias: Tensor | None = None, raw: bool = False
) -> Tensor | Raw:
    """x [T, K] times (weight [N, K] fp8, row n times scale [N]) transposed, plus bias [N]: [T, N] in x's type.

    The rows of x are quantized as ``quantize_rows`` does (dynamic, one scale a token); sums are in float32. GPU
    implementations may leave x as it is, which is nearer to the unquantized product: one token does so, because there
    the time goes into reading the weight. Alone and among others a token's results may therefore differ by x's
    rounding: 2^-4 of each value at most, about 0.026 of the result's norm on normal values. Rows that are quantized
    already are taken as they are. With ``raw`` (and no bias) the result may be ``Raw``, where that saves a pass.
    """
    rows = x if isinstance(x, Fp8Rows) else rows_of(x)
    product = Raw(rows.values.float() @ weight.float().t(), rows.scale, scale, rows.dtype)
    if raw:
        return product
    y = product.values * rows.scale.unsqueeze(-1) * scale
    return (y if bias is None else y + bias.float()).to(rows.dtype)


def add_rms_norm_fp8(
    x: Tensor | Raw, residual: Tensor, weight: Tensor, eps: float, quantize: bool
) -> Tensor | Fp8Rows:
    """``add_rms_norm`` that applies the scales of the product before it and, with ``quantize``, rounds for the next."""
    residual.add_(settled(x))
    normed = rms_norm(residual, weight, eps)
    return rows_of(normed) if quantize else normed


def act_mul_fp8(gate_up: Tensor | Raw, activation: str, quantize: bool) -> Tensor | Fp8Rows:
    """``act_mul`` with the same two extras."""
    out = act_mul(settled(gate_up), activation)
    return rows_of(out) if quantize else out


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
_NORM = "octavo.device.kernels.triton.norm:"
_ACTIVATION = "octavo.device.kernels.triton.activation:"
ADD_RMS_NORM_FP8 = Op(
    "add_rms_norm_fp8",
    add_rms_norm_fp8,
    (
        Implementation("triton-hopper", _NORM + "add_rms_norm_fp8_hopper", _is_hopper, "triton"),
        Implementation("triton", _NORM + "add_rms_norm_fp8", _takes_fp8, "triton"),
    ),
)
ACT_MUL_FP8 = Op(
    "act_mul_fp8",
    act_mul_fp8,
    (
        Implementation("triton-hopper", _ACTIVATION + "act_mul_fp8_hopper", _is_hopper, "triton"),
        Implementation("triton", _ACTIVATION + "act_mul_fp8", _takes_fp8, "triton"),
    ),
)
