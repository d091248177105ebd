"""4-bit codes made while plain weights are loaded: small groups with two levels of scales and minimums, as in Q4_K.

A group's scale and minimum are those of the least squared error that a few ranges lead to: for each, codes are rounded to it
and the line through them is fitted anew (Q4_K's own quantizer does so too). Both are then rounded to bytes, factors of those
of 256 inputs, and the codes rounded to what those stand for. 4.625 bits a weight, 4.25 in the long rows of large models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.device.ops.packed import Layout
from octavo.model.quantization.packed import LoadedPackedWeight, Rows, choose_width

if TYPE_CHECKING:
    from octavo.model.layers.build import Build

GROUP, LARGE_GROUP, OUTER = 32, 128, 256
LARGE = 8192  # inputs from which on models are large: they suffer less, and memory is what they lack
TOP, BYTE = 15, 255
# What is added to the 15 steps of a group's range: fewer leave the codes at the ends unused, more cut off its largest values.
RANGES = (-0.9, -0.5, -0.1, 0.3, 0.7)
TINY = 1e-30  # keeps quotients of groups of zeros finite


def int4_layout(inputs: int) -> Layout:
    """Where the inputs are no whole groups, one scale and one minimum serve a whole row."""
    group = LARGE_GROUP if inputs >= LARGE else GROUP
    if inputs % group:
        return Layout(4, 0, choose_width(0, inputs), 0, scales="minimum", half=torch.bfloat16)
    return Layout(4, 0, choose_width(group, inputs), group, scales="k", half=torch.bfloat16)


def fit_groups(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minimums [.., 1], at least 0, with which scale * code - minimum comes near parts [.., group]."""
    count = parts.shape[-1]
    low, high = parts.amin(-1, keepdim=True).clamp_(max=0), parts.amax(-1, keepdim=True).clamp_(min=0)
    span = (high - low).clamp_(min=TINY)
    total = parts.sum(-1, keepdim=True)
    scale, minimum = span / TOP, -low
    best = torch.full_like(low, float("inf"))
    for more in RANGES:
        codes = parts.sub(low).mul_((TOP + more) / span).round_().clamp_(0, TOP)
        first, mixed = codes.sum(-1, keepdim=True), (codes * parts).sum(-1, keepdim=True)
        second = codes.square_().sum(-1, keepdim=True)
        # scale * code + least through the pairs (code, value); least <= 0, as bytes of minimums have no sign.
        slope = (count * mixed - first * total) / (count * second - first.square()).clamp_(min=TINY)
        least = ((total - slope * first) / count).clamp_(max=0)
        slope = (mixed - least * first) / second.clamp(min=TINY)
        # The squared error without that of zeros for all.
        error = (
            slope.square() * second
            + count * least.square()
            + 2 * (slope * (least * first - mixed) - least * total)
        )
        better = (error < best) & (slope > 0)
        best = torch.where(better, error, best)
        scale, minimum = torch.where(better, slope, scale), torch.where(better, -least, minimum)
    return scale, minimum


def as_bytes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers [n, blocks, 8, 1], at least 0, as bytes and a bfloat16 factor a block [n, blocks, 1, 1]."""
    # One unit in the last place more, so that rounding it leaves no number above 255 of it.
    unit = (values.amax(2, keepdim=True) * (1 + 2**-8) / BYTE).clamp_(min=TINY).bfloat16()
    return (values / unit.float()).round_().clamp_(max=BYTE), unit


def quantize_groups(values: Tensor, group: int) -> Rows:
    """Rows [n, K] of float32 as codes from 0 to 15 and their scales, those of ``int4_layout``."""
    rows, inputs = values.shape
    if not group:
        parts = values.view(rows, 1, inputs)
        fields = torch.cat(fit_groups(parts), dim=-1).bfloat16()
        scale, minimum = fields.float().unsqueeze(-1).unbind(2)
        return Rows(_codes(parts, scale, minimum).view(rows, inputs), fields)
    parts = F.pad(values, (0, -inputs % OUTER)).view(rows, -1, OUTER // group, group)
    small, units = zip(*(as_bytes(found) for found in fit_groups(parts)))
    scale, minimum = (byte * unit.float() for byte, unit in zip(small, units))
    codes = _codes(parts, scale, minimum).view(rows, -1)[:, :inputs]
    fields = torch.cat(small, dim=-1).to(torch.uint8).view(rows, -1, 2)[:, : inputs // group]
    return Rows(codes, fields, torch.cat(units, dim=-1).view(rows, -1, 2))


def _codes(parts: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    found = parts.add(minimum).div_(scale.clamp(min=TINY)).round_().clamp_(0, TOP)
    return found.to(torch.uint8)


class Int4Weight(LoadedPackedWeight):
    """See ``LoadedPackedWeight``."""

    def __init__(self, out_features: int, in_features: int, build: Build, *, stack: bool = False) -> None:
        super().__init__(int4_layout(in_features), out_features, in_features, build, stack=stack)

    def quantize(self, values: Tensor) -> Rows:
        """See ``LoadedPackedWeight``."""
        return quantize_groups(values, self.packed.layout.group)
