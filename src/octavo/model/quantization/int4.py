"""4-bit codes with a scale and a zero point for 128 inputs (32 in small models), made while plain weights are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octavo.device.ops.packed import Layout
from octavo.model.quantization.packed import LoadedPackedWeight, Rows, choose_width, zero_fields

if TYPE_CHECKING:
    from octavo.model.layers.build import Build

GROUPS = (128, 64, 32)  # the largest that divides the inputs
SMALL = 2048  # inputs below which models are small and sensitive, and groups of 32 cost little
SHRINK = (
    1.0,
    0.95,
    0.9,
    0.85,
    0.8,
)  # shares of a group's range that are tried; outliers are cut off where that pays
TOP = 15


def int4_layout(inputs: int) -> Layout:
    """Where the inputs are no multiple of 32, one scale serves a whole row."""
    sizes = GROUPS if inputs >= SMALL else GROUPS[-1:]
    group = next((size for size in sizes if inputs % size == 0), 0)
    return Layout(4, 0, choose_width(group, inputs), group, scales="zero")


def quantize_groups(values: Tensor, group: int) -> Rows:
    """Rows [n, K] of float32 as codes from 0 to 15, fp16 scales and zero points with the least squared error of a few ranges."""
    rows, inputs = values.shape
    parts = values.view(rows, -1, group or inputs)
    low, high = parts.amin(-1, keepdim=True).clamp(max=0), parts.amax(-1, keepdim=True).clamp(min=0)
    best = torch.full_like(low, float("inf"))
    codes, scale, zero = torch.zeros_like(parts), torch.ones_like(low), torch.zeros_like(low)
    for share in SHRINK:
        unit = ((high - low) * (share / TOP)).clamp(min=1e-7).half().float()
        middle = (-low * share / unit).round().clamp(0, TOP)
        found = (parts / unit + middle).round().clamp(0, TOP)
        error = ((found - middle) * unit - parts).square().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        codes, scale, zero = (
            torch.where(better, new, old) for new, old in ((found, codes), (unit, scale), (middle, zero))
        )
    fields = zero_fields(scale.squeeze(-1).half(), zero.squeeze(-1))
    return Rows(codes.view(rows, inputs).to(torch.uint8), fields)


class Int4Weight(LoadedPackedWeight):
    """See ``LoadedPackedWeight``."""

    def __init__(self, out_features: int, in_features: int, build: Build) -> None:
        super().__init__(int4_layout(in_features), out_features, in_features, build)

    def quantize(self, values: Tensor) -> Rows:
        """See ``LoadedPackedWeight``."""
        return quantize_groups(values, self.packed.layout.group)
