"""Linear maps whose weights are codes of 2 to 8 bits with scales: ONE layout for every weight-only format.

A run is 8 W inputs of one output (4 W where codes have 8 bits, 16 W where they have 2 or 3), W = 16 or 32. It is stored as W words of 32 bits; word w
holds the codes of inputs w, W + w, 2 W + w, ... of the run. So one mask gives two codes in the two halves of a word, ready
to become two bfloat16 numbers, and the codes at one place of all words are W neighbouring inputs, ready for a tensor core.

    4 bits    word w   |31        16|15         0|        inputs of the run, for W = 32
                       | 7  5  3  1 | 6  4  2  0 |        0: w   1: 32 + w   2: 64 + w  ...  7: 224 + w
    8 bits    word w   |  3    2    |  1    0    |        0: w   1: 32 + w   2: 64 + w       3:  96 + w
    2 bits    word w   |15 13 .. 3 1|14 12 .. 2 0|        0: w   1: 16 + w ... 15: 240 + w, for W = 16

    words [runs, N, W] int32         a tile of some outputs and one run is one piece of memory
    high  [runs, N, W] uint8, int16  the bits above those (one, or two): even places in the low half, odd ones in the high half
    scale [ceil(groups / per word), N] int32    a group is ``group`` inputs of one output; 0 = all of them
    outer [ceil(inputs / 256) or 1, N] int32    factors of the scales, in formats of two levels

What a scale word holds, from its lowest bits on ("half" is float16 or bfloat16):

    zero     half s | z (16 bits)                    value = s (code - z)       AWQ, GPTQ, compressed-tensors
    pair     half s | half s of the next group       value = s (code - offset)  the same without zero points; Q4_0, Q8_0
    minimum  half s | half m                         value = s code - m         Q4_1, Q5_1
    k        bytes s, m | s, m of the next group     value = d s code - dm m    Q4_K, Q5_K;  outer: half d | half dm
    k4       nibbles s, m of four groups             value = d s code - dm m    Q2_K;  outer: half d | half dm
    bytes    signed bytes s of four groups           value = d s (code - offset)       Q3_K, Q6_K, IQ4_XS;  outer: half d
    e4m3     8-bit floats s of four groups           value = d s v[code]              NVFP4;  outer: float32 d
    float    float32 s                               value = s v[code]                  NF4, fp8

Where codes are small floats (E2M1, 8-bit E4M3) or places in a table (the sixteen values of NF4, of IQ4), v[code] stands for code - offset. Inputs are padded to whole runs;
the operand beside the padding is 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from octavo.device.ops.bind import Op, triton_rows

CodeKind = Literal["int", "e2m1", "nf4", "e4m3", "iq4"]
ScaleKind = Literal["zero", "pair", "minimum", "k", "k4", "bytes", "e4m3", "float"]
GROUPS_IN_WORD: dict[ScaleKind, int] = {
    "zero": 1,
    "pair": 2,
    "minimum": 1,
    "k": 2,
    "k4": 4,
    "bytes": 4,
    "e4m3": 4,
    "float": 1,
}
OUTER_GROUP: dict[ScaleKind, int] = {
    "k": 256,
    "k4": 256,
    "bytes": 256,
    "e4m3": 0,
}  # inputs under an outer scale; 0 = all
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# Quantiles of the normal distribution (Dettmers et al. 2023, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml's kvalues_iq4nl
TABLES: dict[CodeKind, tuple[float, ...]] = {"e2m1": E2M1, "nf4": NF4, "iq4": IQ4}


@dataclass(frozen=True)
class Layout:
    """What is the same for all codes of a matrix; see the drawing above.

    ``bits`` are those in the words (2, 4 or 8), ``high_bits`` (0, 1, 2) those beside them, ``width`` is W. ``group`` is a
    multiple of W; 0 = one scale for all inputs. ``half`` is the type of 16-bit scales. A run has one outer scale.
    """

    bits: int = 4
    high_bits: int = 0
    width: int = 32
    group: int = 0
    code: CodeKind = "int"
    scales: ScaleKind = "pair"
    offset: int = 8
    half: torch.dtype = torch.float16
    fragments: bool = False

    def __post_init__(self) -> None:
        known = self.bits in (2, 4, 8) and self.width in (16, 32) and self.group % self.width == 0
        if not known or OUTER_GROUP.get(self.scales, 0) % self.run or self.high_bits * self.places > 16:
            raise ValueError(f"no such layout: {self}")

    @property
    def places(self) -> int:
        """Codes in a word."""
        return 32 // self.bits

    @property
    def run(self) -> int:
        """Inputs in a run."""
        return self.width * self.places

    def num_runs(self, inputs: int) -> int:
        """Runs of an output."""
        return -(-inputs // self.run)

    def num_groups(self, inputs: int) -> int:
        """Groups of an output that have inputs."""
        return -(-inputs // self.group) if self.group else 1

    def scale_rows(self, inputs: int) -> int:
        """Words of scales of an output, padding included."""
        inside = GROUPS_IN_WORD[self.scales] * self.group
        return -(-self.num_runs(inputs) * self.run // inside) if inside else 1

    def outer_rows(self, inputs: int) -> int:
        """Words of outer scales of an output; 0 where there are none."""
        if self.scales not in OUTER_GROUP:
            return 0
        group = OUTER_GROUP[self.scales]
        return -(-self.num_runs(inputs) * self.run // group) if group else 1


@dataclass
class Packed:
    """A matrix [outputs, inputs] of codes. ``order``: input i of the stored matrix is the operand's input order[i]."""

    layout: Layout
    outputs: int
    inputs: int
    words: Tensor
    scale: Tensor
    high: Tensor | None = None
    outer: Tensor | None = None
    order: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes that a product reads of it."""
        found = (self.words, self.high, self.scale, self.outer, self.order)
        return sum(tensor.numel() * tensor.element_size() for tensor in found if tensor is not None)


def empty_packed(layout: Layout, outputs: int, inputs: int, device: torch.device) -> Packed:
    """A matrix of zeros to be filled."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    shape = (layout.num_runs(inputs), outputs, layout.width)
    high = None
    if layout.high_bits:
        high = zeros(*shape, dtype=torch.uint8 if layout.high_bits * layout.places == 8 else torch.int16)
    outer = layout.outer_rows(inputs)
    return Packed(
        layout,
        outputs,
        inputs,
        zeros(*shape),
        zeros(layout.scale_rows(inputs), outputs),
        high,
        zeros(outer, outputs) if outer else None,
    )


def _shifts(layout: Layout, bits: int, device: torch.device) -> Tensor:
    """Where in a word of ``bits`` bits a code the code at each place begins [places]."""
    place = torch.arange(layout.places, device=device)
    if layout.bits == 8:
        return place * 8
    return place // 2 * bits + place % 2 * (layout.places // 2 * bits)


def _signed(values: Tensor, bits: int) -> Tensor:
    """Whole numbers of ``bits`` bits in int64 as the signed numbers that have the same bits."""
    return torch.where(values >= 1 << (bits - 1), values - (1 << bits), values)


def in_fragments(layout: Layout) -> Layout:
    """The same with codes as tensor cores take them, where there are kernels for it: not for groups of 16."""
    part = 16 * layout.places
    fits = layout.group % 32 == 0 and (
        part % layout.group == 0 if 0 < layout.group < part else layout.group % part == 0
    )
    return replace(layout, fragments=True) if fits and layout.bits in (4, 8) else layout


def _by_place(codes: Tensor, layout: Layout) -> Tensor:
    """Codes [N, K] of whole runs as [runs, N, W, places]."""
    outputs = codes.shape[0]
    if not layout.fragments:
        return codes.view(outputs, -1, layout.places, layout.width).permute(1, 0, 3, 2)
    halves, blocks = layout.width // 16, layout.places // 2
    parts = codes.view(outputs, -1, halves, blocks, 2, 2, 4, 2).permute(1, 0, 2, 6, 3, 4, 5, 7)
    return parts.reshape(parts.shape[0], outputs, layout.width, layout.places)


def _by_input(places: Tensor, layout: Layout) -> Tensor:
    """The reverse of ``_by_place``."""
    runs, outputs, width, count = places.shape
    if not layout.fragments:
        return places.permute(1, 0, 3, 2).reshape(outputs, runs * count * width)
    parts = places.reshape(runs, outputs, width // 16, 4, count // 2, 2, 2, 2)
    return parts.permute(1, 0, 2, 4, 5, 6, 3, 7).reshape(outputs, runs * count * width)


def pack_codes(codes: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """Codes [N, K] (uint8 of ``bits`` + ``high_bits`` bits) as words [runs, N, W] and their high bits."""
    outputs, inputs = codes.shape
    padded = codes.new_zeros((outputs, layout.num_runs(inputs) * layout.run), dtype=torch.int64)
    padded[:, :inputs] = codes
    by_place = _by_place(padded, layout)
    low = by_place & (2**layout.bits - 1)
    words = _signed((low << _shifts(layout, layout.bits, codes.device)).sum(-1), 32).to(torch.int32)
    if not layout.high_bits:
        return words, None
    high = ((by_place >> layout.bits) << _shifts(layout, layout.high_bits, codes.device)).sum(-1)
    narrow = layout.high_bits * layout.places == 8
    return words, high.to(torch.uint8) if narrow else _signed(high, 16).to(torch.int16)


def unpack_codes(packed: Packed) -> Tensor:
    """The codes [N, K] as uint8."""
    layout, device = packed.layout, packed.words.device
    codes = packed.words.unsqueeze(-1).to(torch.int64) >> _shifts(layout, layout.bits, device)
    codes &= 2**layout.bits - 1
    if packed.high is not None:
        at = _shifts(layout, layout.high_bits, device)
        codes |= (packed.high.unsqueeze(-1).to(torch.int64) >> at & (2**layout.high_bits - 1)) << layout.bits
    values: Tensor = _by_input(codes, layout)[:, : packed.inputs].to(torch.uint8)
    return values


def join_fields(fields: Tensor, rows: int) -> Tensor:
    """Numbers [.., N, fields] of 8, 16 or 32 bits (any type) as words [rows, N] int32, lowest field first.

    Fields are those of a word's groups one after the other: [N, G] of one field a group, or [N, G, 2].
    """
    outputs = fields.shape[0]
    flat = fields.reshape(outputs, -1).contiguous()
    count = 4 // flat.element_size()
    padded = flat.new_zeros((outputs, rows * count))
    padded[:, : flat.shape[1]] = flat
    words: Tensor = padded.view(torch.int32).t().contiguous()
    return words


def split_fields(words: Tensor, dtype: torch.dtype) -> Tensor:
    """The reverse of ``join_fields``: words [rows, N] as numbers [N, fields]."""
    fields: Tensor = words.t().clone(memory_format=torch.contiguous_format).view(dtype)
    return fields


def _spread_groups(per_group: Tensor, group: int, inputs: int) -> Tensor:
    """[N, groups] as float32 [N, K]."""
    wide = per_group.float()
    return wide.repeat_interleave(group, dim=1)[:, :inputs] if group else wide[:, :1]


def _factors(packed: Packed) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros (or minimums) in float32, by input."""
    layout, words, outer = packed.layout, packed.scale, packed.outer

    def spread(per_group: Tensor, group: int = layout.group) -> Tensor:
        return _spread_groups(per_group, group, packed.inputs)

    if layout.scales == "float":
        return spread(split_fields(words, torch.float32)), None
    if layout.scales == "pair":
        return spread(split_fields(words, layout.half)), None
    if layout.scales in ("zero", "minimum"):
        second = torch.int16 if layout.scales == "zero" else layout.half
        return spread(split_fields(words, layout.half)[:, ::2]), spread(split_fields(words, second)[:, 1::2])
    if outer is None:
        raise ValueError(f"scales of kind {layout.scales!r} have two levels")
    if layout.scales == "e4m3":
        small = spread(split_fields(words, torch.float8_e4m3fn).float())
        return spread(split_fields(outer, torch.float32), 0) * small, None
    halves = split_fields(outer, layout.half)
    if layout.scales == "bytes":
        return spread(halves[:, ::2], 256) * spread(split_fields(words, torch.int8)), None
    small = split_fields(words, torch.uint8)
    inner = (small & 15, small >> 4) if layout.scales == "k4" else (small[:, ::2], small[:, 1::2])
    return spread(halves[:, ::2], 256) * spread(inner[0]), spread(halves[:, 1::2], 256) * spread(inner[1])


def unpack(packed: Packed) -> Tensor:
    """The values [N, K] in float32, inputs in stored order; the order of operations is part of each format."""
    layout = packed.layout
    codes = unpack_codes(packed)
    scale, zero = _factors(packed)
    if layout.code == "e4m3":
        return codes.view(torch.float8_e4m3fn).float() * scale
    if layout.code != "int":
        values = torch.tensor(TABLES[layout.code], dtype=torch.float32, device=codes.device)
        return values[codes.long()] * scale
    if zero is None:
        return (codes.float() - layout.offset) * scale
    return (codes.float() - zero) * scale if layout.scales == "zero" else scale * codes.float() - zero


def linear_packed(x: Tensor, weight: Packed, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x [T, K] times ``weight`` [N, K] transposed, plus bias [N]: [T, N] in x's type, or into ``out``.

    Values and sums are float32 here; GPU implementations round values (or codes, exactly) to x's type. ``out`` may be some
    columns of a wider tensor.
    """
    if weight.order is not None:
        x = x[:, weight.order.long()]
    y = x.float() @ unpack(weight).t()
    y = (y if bias is None else y + bias.float()).to(x.dtype)
    return y if out is None else out.copy_(y)


LINEAR_PACKED = Op(
    "linear_packed",
    linear_packed,
    triton_rows("fragments:LinearFragments", "LinearFragmentsHopper", factory=True),
)


def rows_of(packed: Packed, rows: slice) -> Packed:
    """Views of some outputs."""
    return replace(
        packed,
        outputs=len(range(*rows.indices(packed.outputs))),
        words=packed.words[:, rows],
        scale=packed.scale[:, rows],
        high=None if packed.high is None else packed.high[:, rows],
        outer=None if packed.outer is None else packed.outer[:, rows],
    )
