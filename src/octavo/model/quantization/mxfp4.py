"""MXFP4: 4-bit floats in blocks of 32 with a shared power of two (OCP Microscaling Formats 1.0, 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
EXPONENT_BIAS = 127
# E2M1: a sign, two bits of exponent, one of mantissa.
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def decode_mxfp4(blocks: Tensor, scales: Tensor, out: Tensor) -> None:
    """Fill out [E, rows, 32 n] from blocks [E, rows, n, 16] uint8 (low nibble first) and scales [E, rows, n] uint8.

    One matrix of E at a time, so that no second full copy exists; ``out`` may have any type and device.
    """
    values = torch.tensor(VALUES, dtype=torch.float32)
    for index in range(out.shape[0]):
        packed = blocks[index]
        pairs = torch.stack((values[(packed & 15).long()], values[(packed >> 4).long()]), dim=-1)
        exponents = scales[index].to(torch.int32) - EXPONENT_BIAS
        out[index].copy_(torch.ldexp(pairs.flatten(-2), exponents.unsqueeze(-1)).view(out.shape[1:]))
