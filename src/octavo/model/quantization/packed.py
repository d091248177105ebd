"""Matrices of packed codes: allocation, and the way from any checkpoint's tensors into the layout of ``ops.packed``.

A format says what it reads (``Codes.sources``) and gives rows of codes and scales (``Codes.read``); everything that formats
share is here: rows in our order, this rank's part, cuts on group boundaries, some rows at a time on the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from octavo.device.ops.packed import (
    LINEAR_PACKED,
    OUTER_GROUP,
    TABLES,
    Layout,
    empty_packed,
    in_fragments,
    join_fields,
    pack_codes,
)
from octavo.errors import ModelFileError, UsageError
from octavo.model.blocks import Part
from octavo.model.layers.load import Cut, LoadItem, Source, StoredMatrix
from octavo.model.layers.order import stored_rows

if TYPE_CHECKING:
    from octavo.model.layers.build import Build

CODES_AT_ONCE = 1 << 22  # unpacked at a time: 32 MiB of int64 beside the weight
BELOW_TWO = 0xBFBFBFBF - (
    1 << 32
)  # four 8-bit floats without the highest bit of the exponent: no NaN among them
AGAIN = "The configuration and the weights do not belong together."


@dataclass
class Rows:
    """Codes [n, K] uint8 and the fields of their scale words, [n, groups] or [n, groups, 2], of some outputs."""

    codes: Tensor
    scale: Tensor
    outer: Tensor | None = None


class Codes(Protocol):
    """How a format stores a matrix of codes."""

    def layout(self, inputs: int) -> Layout:
        """Ours for a matrix of so many inputs."""

    def sources(self, hf: str, gguf: str) -> tuple[Source, ...]:
        """Its tensors; ``hf`` and ``gguf`` are the module's names without ".weight"."""

    def order(self, stored: Mapping[str, Tensor], inputs: int) -> Tensor | None:
        """The order of inputs that brings groups together; None where they are."""

    def read(self, stored: Mapping[str, Tensor], rows: Tensor, inputs: int) -> Rows:
        """Stored outputs ``rows`` with all ``inputs``, in stored order. Raises ``ModelFileError`` for wrong shapes."""


def choose_width(group: int, inputs: int, bits: int = 4) -> int:
    """Words of a run: the wide one, unless groups are small or the narrow one pads less."""
    if group % 32:
        return 16
    wide, narrow = 32 * 32 // bits, 16 * 32 // bits
    return 16 if -inputs % narrow < -inputs % wide else 32


class PackedWeight:
    """A matrix [N, K] in one layout, on a GPU in the order of tensor cores where there is one; a stack of experts as it is."""

    def __init__(
        self, layout: Layout, out_features: int, in_features: int, build: Build, *, stack: bool = False
    ) -> None:
        if build.spec.device == "cuda" and not stack:
            layout = in_fragments(layout)
        self.packed = empty_packed(layout, out_features, in_features, build.device)
        self.linear = build.binder.bind(LINEAR_PACKED, build.spec)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See ``Weight``."""
        out: Tensor = self.linear(x, self.packed, bias)
        return out

    def multiply_into(self, out: Tensor, x: Tensor, bias: Tensor | None) -> None:
        """The same into some columns of a wider tensor."""
        self.linear(x, self.packed, bias, out)

    def put(self, place: slice, rows: Rows) -> None:
        """Set some outputs."""
        packed, layout = self.packed, self.packed.layout
        words, high = pack_codes(rows.codes, layout)
        packed.words[:, place] = words
        if packed.high is not None and high is not None:
            packed.high[:, place] = high
        packed.scale[:, place] = join_fields(rows.scale, packed.scale.shape[0])
        if packed.outer is not None and rows.outer is not None:
            packed.outer[:, place] = join_fields(rows.outer, packed.outer.shape[0])


class LoadedPackedWeight(PackedWeight, ABC):
    """Quantized while plain values are loaded."""

    def item(self, hf: str, gguf: str, rows: slice, part: Part, cut: Cut | None) -> LoadItem:
        """See ``Weight``; the loader quantizes into it, some rows at a time."""
        shape = torch.empty((rows.stop - rows.start, self.packed.inputs), dtype=torch.float32, device="meta")
        home = self.packed.words[:, rows]
        return LoadItem(hf, gguf, shape, part, cut=cut, home=home, store=partial(self.store, rows.start))

    def store(self, first: int, rows: slice, values: Tensor) -> None:
        """Quantize float32 values into rows, counted from ``first`` on."""
        self.put(slice(first + rows.start, first + rows.stop), self.quantize(values))

    @abstractmethod
    def quantize(self, values: Tensor) -> Rows:
        """Codes and scales of rows of float32."""


class StoredPackedWeight(PackedWeight):
    """Read as a format stores it."""

    def __init__(
        self, codes: Codes, out_features: int, in_features: int, build: Build, *, stack: bool = False
    ) -> None:
        super().__init__(codes.layout(in_features), out_features, in_features, build, stack=stack)
        self.codes = codes
        self.ordered = False

    def item(self, hf: str, gguf: str, rows: slice, part: Part, cut: Cut | None) -> LoadItem:
        """See ``Weight``."""
        return self.rows_item(hf, gguf, rows, part, cut)

    def rows_item(
        self,
        hf: str,
        gguf: str,
        rows: slice,
        part: Part,
        cut: Cut | None,
        index: Tensor | None = None,
    ) -> StoredMatrix:
        """The same; ``index`` says which stored rows these are, where ``part`` and ``cut`` do not."""
        names = hf.removesuffix(".weight"), gguf.removesuffix(".weight")
        return StoredMatrix(
            hf,
            gguf,
            torch.empty((rows.stop - rows.start, self.packed.inputs), dtype=torch.uint8, device="meta"),
            part,
            cut=cut,
            home=self.packed.words[:, rows],
            sources=self.codes.sources(*names),
            take=partial(self.take, names[0] or names[1], rows, part, cut, index),
            randomize=partial(self.randomize, rows),
        )

    def take(
        self,
        name: str,
        place: slice,
        part: Part,
        cut: Cut | None,
        index: Tensor | None,
        stored: Mapping[str, Tensor],
    ) -> None:
        """Fill rows from a checkpoint's tensors, some at a time, on the device."""
        layout, device = self.packed.layout, self.packed.words.device
        chosen = range(self.packed.inputs)
        if cut is not None and cut.dim == 1:
            chosen = range(cut.start, cut.start + cut.size)
        total = cut.total if cut is not None and cut.dim == 1 else self.packed.inputs
        bias = stored.get("zero_bias")
        if bias is not None and bias.any():
            raise ModelFileError(f"{name}.bias is not zero, but the architecture has no such bias.", AGAIN)
        # Blocks lie row by row: those of a stack of experts are moved as they are needed.
        here = {key: tensor if key == "blocks" else tensor.to(device) for key, tensor in stored.items()}
        order = self.codes.order(here, total)
        if total != len(chosen):
            check_cut(name, layout, chosen, order)
        self._set_order(name, order)
        if index is None:
            index = stored_rows(part, cut, gguf="blocks" in stored)
        index = index.to(device)
        step = max(1, CODES_AT_ONCE // total)
        for start in range(0, len(index), step):
            ids = index[start : start + step]
            found = self.codes.read(here, ids, total)
            first = place.start + start
            self.put(slice(first, first + len(ids)), cut_rows(found, layout, chosen, total, order))

    def _set_order(self, name: str, order: Tensor | None) -> None:
        """All parts of a fused matrix see the same input, so they must be in the same order."""
        known = self.packed.order
        same = known is order or (known is not None and order is not None and torch.equal(known, order))
        if self.ordered and not same:
            raise ModelFileError(
                f"{name} orders its inputs otherwise than the matrices it is computed with.",
                "Use a model quantized without desc_act (act_order).",
            )
        self.packed.order, self.ordered = order, True

    def randomize(self, rows: slice, generator: torch.Generator) -> None:
        """Random codes with one scale, so that products keep the size of their operand."""
        packed, layout = self.packed, self.packed.layout
        packed.words[:, rows] = packed.words[:, rows].random_(-(1 << 31), (1 << 31) - 1, generator=generator)
        if packed.high is not None:
            packed.high[:, rows] = packed.high[:, rows].random_(0, 127, generator=generator)
        if layout.code == "e4m3":
            packed.words[:, rows] &= BELOW_TWO
        levels = 2 ** (layout.bits + layout.high_bits)
        spread = levels / 12**0.5 if layout.code == "int" else 0.55
        if layout.code in TABLES:
            spread = float(torch.tensor(TABLES[layout.code], dtype=torch.float32).square().mean().sqrt())
        scale, outer = constant_scales(layout, packed.inputs**-0.5 / spread, levels // 2)
        packed.scale[:, rows] = scale
        if packed.outer is not None:
            packed.outer[:, rows] = outer


def constant_scales(layout: Layout, size: float, middle: int) -> tuple[int, int]:
    """Scale and outer words of scales of one ``size`` that center codes around ``middle``."""
    half = torch.tensor([size, size], dtype=layout.half)
    if layout.scales == "zero":
        half[1:] = torch.tensor([middle], dtype=torch.int16).view(layout.half)
    elif layout.scales == "minimum":
        half[1] *= middle
    elif layout.scales == "float":
        half = torch.tensor([size], dtype=torch.float32)
    outer = torch.zeros(1, dtype=torch.int32)
    if layout.scales == "e4m3":
        half = torch.ones(4).to(torch.float8_e4m3fn)
        outer = torch.tensor([size], dtype=torch.float32)
    elif layout.scales == "k4":
        outer = torch.tensor([size / 8, size / 8 * middle], dtype=layout.half)
        half = torch.full((4,), 8 | 8 << 4, dtype=torch.uint8)
    elif layout.scales in ("k", "bytes"):
        outer = torch.tensor([size / 32, size / 32 * middle], dtype=layout.half)
        half = torch.full((4,), 32, dtype=torch.uint8)
    return int(half.view(torch.int32)), int(outer.view(torch.int32))


def check_cut(name: str, layout: Layout, chosen: range, order: Tensor | None) -> None:
    """Raise ``UsageError`` where a rank's inputs are no whole groups."""
    unit = OUTER_GROUP.get(layout.scales) or layout.group
    if order is not None:
        raise UsageError(
            f"{name} is quantized with desc_act (act_order): its inputs cannot be split over devices.",
            "Use --tensor-parallel-size 1 or a model quantized without it.",
        )
    if unit and (chosen.start % unit or len(chosen) % unit):
        raise UsageError(
            f"{name}: {len(chosen)} inputs a device are no whole groups of {unit}.",
            "Choose a smaller tensor parallel size.",
        )


def cut_rows(rows: Rows, layout: Layout, chosen: range, total: int, order: Tensor | None) -> Rows:
    """This rank's inputs, groups together."""
    codes = rows.codes if order is None else rows.codes[:, order]
    if len(chosen) == total:
        return Rows(codes, rows.scale, rows.outer)

    def groups(fields: Tensor, size: int) -> Tensor:
        return fields[:, chosen.start // size : chosen.stop // size] if size else fields

    outer = None if rows.outer is None else groups(rows.outer, 0 if layout.scales == "e4m3" else 256)
    return Rows(codes[:, chosen.start : chosen.stop], groups(rows.scale, layout.group), outer)


def shaped(stored: Mapping[str, Tensor], key: str, *shape: int, kind: torch.dtype | None = None) -> Tensor:
    """A stored tensor that must have this shape (-1 = any size) and type."""
    tensor = stored[key]
    fits = tensor.dim() == len(shape) and all(b in (-1, a) for a, b in zip(tensor.shape, shape))
    if not fits or (kind is not None and tensor.dtype != kind):
        raise ModelFileError(
            f"A quantized matrix has {key} of shape {list(tensor.shape)} ({tensor.dtype}), not {list(shape)}.",
            AGAIN,
        )
    return tensor


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """``count`` numbers of ``bits`` bits from words [.., n] int32, lowest bits first, as uint8 [.., count].

    Where 32 is no multiple of ``bits``, numbers run on from one word into the next.
    """
    first = torch.arange(count, device=words.device) * bits
    word, at = first // 32, first % 32
    low = words[..., word] >> at
    if 32 % bits:
        low = (words[..., word].long() & 0xFFFFFFFF) >> at
        following = words[..., (word + 1).clamp(max=words.shape[-1] - 1)].long() & 0xFFFFFFFF
        low = torch.where(at + bits > 32, low | (following << (32 - at)), low)
    numbers: Tensor = (low & (2**bits - 1)).to(torch.uint8)
    return numbers


def zero_fields(scale: Tensor, zero: Tensor) -> Tensor:
    """Fields [n, groups, 2] of "zero" scale words: the scale, and the zero's bits beside it."""
    return torch.stack((scale, zero.to(torch.int16).view(scale.dtype)), dim=-1)


def order_of(groups: Tensor | None, group: int, inputs: int) -> Tensor | None:
    """The order of inputs that brings those of a group together; None where they lie so."""
    if groups is None:
        return None
    wanted = torch.arange(inputs, device=groups.device) // (group or inputs)
    if groups.shape != (inputs,):
        raise ModelFileError(f"A quantized matrix of {inputs} inputs has groups for {groups.numel()}.", AGAIN)
    if torch.equal(groups.long(), wanted):
        return None
    order = torch.argsort(groups.long(), stable=True)
    if not torch.equal(groups.long()[order], wanted):
        raise ModelFileError("The groups of a quantized matrix are not of one size.", AGAIN)
    return order
