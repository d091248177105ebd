"""Experts whose matrices are packed codes: one stack [E * 2 I, H] and one [E * H, I], filled as the files hold them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octavo.errors import UnsupportedModelError
from octavo.model.blocks import Experts, Part
from octavo.model.layers.build import Build
from octavo.model.layers.experts import ExpertWeights
from octavo.model.layers.load import Cut, LoadItem
from octavo.model.quantization.base import Stack
from octavo.model.quantization.floats4 import Mxfp4Codes
from octavo.model.quantization.gguf import GgufCodes
from octavo.model.quantization.packed import LoadedPackedWeight, StoredPackedWeight


class PackedExpertWeights(ExpertWeights):
    """See ``ExpertWeights``; ``gate_up`` and ``down`` are on no device and say shapes alone."""

    def __init__(
        self, block: Experts, build: Build, hf_prefix: str, gguf_prefix: str, gate_up: Stack, down: Stack
    ) -> None:
        super().__init__(block, replace(build, device=torch.device("meta")), hf_prefix, gguf_prefix)
        self.stacks = gate_up, down
        if block.bias:
            self.gate_up_bias = build.empty(block.num, 2 * block.intermediate)
            self.down_bias = build.empty(block.num, block.hidden)

    def matrices(self) -> tuple[Any, Any]:
        """See ``ExpertWeights``."""
        return self.stacks[0].packed, self.stacks[1].packed

    def items(self) -> list[LoadItem]:
        """What the loader must fill."""
        gate_up, down = self.stacks
        if isinstance(gate_up, LoadedPackedWeight) or isinstance(down, LoadedPackedWeight):
            return [self._quantized(item) for item in super().items()]
        if self.block.columns:
            raise UnsupportedModelError(
                f"{self.hf}: quantized experts stored [in, out] are not supported.",
                "Use the unquantized model.",
            )
        if isinstance(gate_up.codes, GgufCodes):
            names = [f"{self.gguf}{name}.weight" for name in self.block.gguf_each]
            return self._stored_stacks(gate_up, down, names, alternating=False) + self._biases()
        if isinstance(gate_up.codes, Mxfp4Codes):
            name = f"{self.hf}.gate_up_proj"
            names = [name, name, f"{self.hf}.down_proj"]
            return self._stored_stacks(gate_up, down, names, alternating=True) + self._biases()
        return self._stored_one_by_one(gate_up, down)

    def _quantized(self, item: LoadItem) -> LoadItem:
        """The same item, and those of all its ways, quantized into the stack on the way in."""
        if item.target.device.type != "meta":
            return item  # a bias
        item.ways = tuple(tuple(self._quantized(part) for part in way) for way in item.ways)
        stack = self.stacks[0] if self._is_gate_up(item.target) else self.stacks[1]
        item.home = stack.packed.words
        if isinstance(stack, LoadedPackedWeight):
            item.store = partial(self._store, stack, item.target)
        return item

    def _is_gate_up(self, view: Tensor) -> bool:
        base = view._base if view._base is not None else view
        return base is self.gate_up

    @staticmethod
    def _store(stack: LoadedPackedWeight, view: Tensor, rows: slice, values: Tensor) -> None:
        """Rows of a view of a stack, counted through its matrices; they do not cross one."""
        size = view.shape[-1]
        index, first = divmod(rows.start, view.shape[-2])
        place = view.storage_offset() // size + first
        if view.dim() == 3:
            place += index * view.stride(0) // size
        stack.store(place, slice(0, len(values)), values)

    def _stored_one_by_one(self, gate_up: StoredPackedWeight, down: StoredPackedWeight) -> list[LoadItem]:
        """Three matrices an expert, each with its scales."""
        block = self.block
        gate, up, last = block.hf_each
        found: list[LoadItem] = []
        for i in range(block.num):
            name = f"{self.hf}.{self.start + i}"
            for half, each in enumerate((gate, up)):
                first = (2 * i + half) * block.intermediate
                rows = slice(first, first + block.intermediate)
                part = Part(each, "", block.intermediate)
                found.append(gate_up.item(f"{name}.{each}.weight", "", rows, part, self._slice(0)))
            rows = slice(i * block.hidden, (i + 1) * block.hidden)
            part = Part(last, "", block.hidden)
            found.append(down.item(f"{name}.{last}.weight", "", rows, part, self._slice(1)))
        return found

    def _stored_stacks(
        self, gate_up: StoredPackedWeight, down: StoredPackedWeight, names: list[str], alternating: bool
    ) -> list[LoadItem]:
        """Stacks whose rows are counted through all experts; gate and up rows may take turns in one."""
        block = self.block
        inner, size = block.intermediate, self.ranks.size if self.whole is None else 1
        total, rank = inner * size, self.ranks.rank if self.whole is None else 0
        gate, up, last = names
        channels = rank * inner + torch.arange(inner)
        found: list[LoadItem] = []
        for i in range(block.num):
            expert = self.start + i
            for half, name in enumerate((gate, up)):
                first = (2 * i + half) * inner
                index = expert * total + channels
                if alternating:
                    index = 2 * index + half
                rows = slice(first, first + inner)
                found.append(
                    gate_up.rows_item(*both(name, alternating), rows, Part("", "", inner), None, index)
                )
            rows = slice(i * block.hidden, (i + 1) * block.hidden)
            index = expert * block.hidden + torch.arange(block.hidden)
            cut = Cut(1, rank * inner, inner, total) if size > 1 else None
            found.append(
                down.rows_item(*both(last, alternating), rows, Part("", "", block.hidden), cut, index)
            )
        return found


def both(name: str, hf: bool) -> tuple[str, str]:
    """A name as the Hugging Face and GGUF names of an item, of which it is one."""
    return (name, "") if hf else ("", name)
