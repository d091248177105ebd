"""Random packed matrices of every layout."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.device.ops.packed import Layout, Packed, empty_packed, join_fields, pack_codes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = {
    "awq": Layout(4, 0, 32, 128, scales="zero"),
    "symmetric": Layout(4, 0, 32, 128, half=torch.bfloat16),
    "group-32": Layout(4, 0, 32, 32),
    "group-64-narrow": Layout(4, 0, 16, 64, scales="zero"),
    "group-128-narrow": Layout(4, 0, 16, 128),
    "channel": Layout(4, 0, 32, 0),
    "channel-8": Layout(8, 0, 32, 0, scales="zero", half=torch.bfloat16),
    "q8_0": Layout(8, 0, 32, 32, offset=128),
    "gptq-8": Layout(8, 0, 32, 128, offset=128),
    "q4_1": Layout(4, 0, 32, 32, scales="minimum"),
    "q5_0": Layout(4, 1, 32, 32, offset=16),
    "q4_k": Layout(4, 0, 32, 32, scales="k"),
    "int4-128": Layout(4, 0, 32, 128, scales="k", half=torch.bfloat16),
    "q5_k": Layout(4, 1, 32, 32, scales="k"),
    "q6_k": Layout(4, 2, 16, 16, scales="bytes", offset=32),
    "q2_k": Layout(2, 0, 16, 16, scales="k4"),
    "q3_k": Layout(2, 1, 16, 16, scales="bytes", offset=4),
    "iq4_nl": Layout(4, 0, 32, 32, code="iq4"),
    "iq4_xs": Layout(4, 0, 32, 32, code="iq4", scales="bytes"),
    "nvfp4": Layout(4, 0, 16, 16, code="e2m1", scales="e4m3"),
    "mxfp4": Layout(4, 0, 32, 32, code="e2m1", half=torch.bfloat16),
    "fp8": Layout(8, 0, 32, 128, code="e4m3", scales="float"),
    "fp8-channel": Layout(8, 0, 32, 0, code="e4m3", scales="float"),
    "nf4": Layout(4, 0, 32, 64, code="nf4", scales="float"),
}


def fields(
    layout: Layout, groups: int, outputs: int, size: float, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Random scale fields [N, ..] and outer fields, of values near ``size``."""

    def near(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=generator) + 0.5) * size

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    outer_groups = layout.outer_rows(groups * layout.group)
    if layout.scales == "float":
        return near(outputs, groups), None
    if layout.scales == "pair":
        return near(outputs, groups).to(layout.half), None
    if layout.scales == "zero":
        zeros = whole(0, 1 << layout.bits, outputs, groups).to(torch.int16).view(layout.half)
        return torch.stack((near(outputs, groups).to(layout.half), zeros), -1), None
    if layout.scales == "minimum":
        return torch.stack((near(outputs, groups), near(outputs, groups) * 8), -1).to(layout.half), None
    if layout.scales == "e4m3":
        return (near(outputs, groups) / size).to(torch.float8_e4m3fn), near(outputs, 1)
    outer = torch.stack((near(outputs, outer_groups), near(outputs, outer_groups) * 8), -1) / 32
    if layout.scales == "k4":
        return whole(0, 256, outputs, groups).to(torch.uint8), outer.to(layout.half)
    if layout.scales == "bytes":
        return whole(-60, 60, outputs, groups).to(torch.int8), outer.to(layout.half)
    return whole(0, 64, outputs, groups, 2).to(torch.uint8), outer.to(layout.half)


def draw(layout: Layout, outputs: int, inputs: int, seed: int = 0) -> Packed:
    """Random codes and scales of a size that keeps products near 1."""
    generator = torch.Generator().manual_seed(seed)
    bits = layout.bits + layout.high_bits
    weight = empty_packed(layout, outputs, inputs, torch.device("cpu"))
    codes = torch.randint(0, 2**bits, (outputs, inputs), generator=generator).to(torch.uint8)
    if layout.code == "e4m3":
        codes = torch.randn((outputs, inputs), generator=generator).to(torch.float8_e4m3fn).view(torch.uint8)
    weight.words, weight.high = pack_codes(codes, layout)
    largest = {"int": 2 ** (bits - 1), "e4m3": 1, "iq4": 72}
    size = inputs**-0.5 / largest.get(layout.code, 2)
    inner, outer = fields(layout, layout.num_groups(inputs), outputs, size, generator)
    weight.scale = join_fields(inner, layout.scale_rows(inputs))
    if outer is not None:
        weight.outer = join_fields(outer, layout.outer_rows(inputs))
    return to_device(weight)


def to_device(weight: Packed) -> Packed:
    for name, value in vars(weight).items():
        if isinstance(value, Tensor):
            setattr(weight, name, value.to(DEVICE).contiguous())
    return weight


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)
