"""Rounding a row to fp8 inside a kernel: ``octavo.device.ops.fp8.quantize_rows``, to the bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FP8 = torch.float8_e4m3fn


@triton.jit
def quantized_row(wide):
    """(values of a whole row as fp8 holds them, in float32; its scale). Places beside the row are zero.

    A row with a NaN is NaN by its scale alone.
    """
    largest = tl.max(tl.abs(wide), 0)
    unit = tl.maximum(largest, 1e-12) * (1.0 / 448.0)
    scaled = tl.div_rn(wide, unit)
    scaled = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
    # Rounded here to 3 bits of mantissa, nearest even, so that the conversion is exact wherever it runs: beside
    # 1.5 * 2^20 times its power of two (2^-6 for subnormals) only those bits of a value survive.
    power = (scaled.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    beside = tl.maximum(power, 0.015625) * 1572864.0
    # max() passes over NaN, the sum does not.
    return scaled + beside - beside, unit + tl.sum(wide * 0.0, 0)


def empty_rows(rows: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for quantized rows, their scales, and the number 1."""
    out = torch.empty((rows, size), dtype=FP8, device=device)
    numbers = torch.empty(rows + 4, dtype=torch.float32, device=device)  # scales from an aligned address on
    return out, numbers[4:], numbers[0]
