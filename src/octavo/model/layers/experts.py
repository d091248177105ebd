"""The stacked matrices of experts, and the ways in which files hold them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from octavo.model.blocks import Experts, Part
from octavo.model.layers.build import Build
from octavo.model.layers.load import Cut, LoadItem

TRANSPOSED = Part("", "", 0, stored="transposed")
ALTERNATING = Part("", "", 0, stored="alternating")
ALTERNATING_COLUMNS = Part("", "", 0, stored="alternating_columns")


class ExpertWeights:
    """gate_up [E, 2 I, H], down [E, H, I], and biases; I is this rank's share of the channels, or E of the experts."""

    def __init__(self, block: Experts, build: Build, hf_prefix: str, gguf_prefix: str) -> None:
        self.block = block
        self.ranks = build.ranks
        self.hf, self.gguf = hf_prefix + block.hf, gguf_prefix
        self.start = self.ranks.rank * block.num if block.total else 0
        self.whole = Cut(0, self.start, block.num, block.total) if block.total else None
        self.gate_up = build.empty(block.num, 2 * block.intermediate, block.hidden)
        self.down = build.empty(block.num, block.hidden, block.intermediate)
        self.gate_up_bias = build.empty(block.num, 2 * block.intermediate) if block.bias else None
        self.down_bias = build.empty(block.num, block.hidden) if block.bias else None

    def matrices(self) -> tuple[Any, Any]:
        """What the op multiplies."""
        return self.gate_up, self.down

    def items(self) -> list[LoadItem]:
        """What the loader must fill; each matrix in the ways that files hold it."""
        gate_up = LoadItem(
            self._name(0), "", self.gate_up, ways=(self._stacked(), self._each(), self._gguf())
        )
        name, gguf, cut = self._name(1), f"{self.gguf}{self.block.gguf_each[2]}.weight", self._cut(2)
        each = tuple(
            LoadItem(
                f"{self.hf}.{self.start + i}.{self.block.hf_each[2]}.weight",
                "",
                self.down[i],
                cut=self._slice(1),
            )
            for i in range(self.block.num)
        )
        ways: tuple[tuple[LoadItem, ...], ...] = ((LoadItem(name, gguf, self.down, cut=cut),), each)
        if self.block.columns:
            gate_up.ways = (self._stacked(TRANSPOSED), self._each())
            ways = ((LoadItem(name, "", self.down, TRANSPOSED, cut=cut),), each)
        elif self.block.interleaved:
            columns = LoadItem(name, "", self.down, TRANSPOSED, cut=cut)
            packed = LoadItem(f"{name}_blocks", "", self.down, cut=cut, scales=f"{name}_scales")
            gate_up.ways = (
                self._stacked(ALTERNATING_COLUMNS),
                self._stacked(ALTERNATING, packed=True),
                self._gguf(),
            )
            ways = ((columns,), (packed,), (LoadItem("", gguf, self.down, cut=cut),))
        return [gate_up, LoadItem(name, "", self.down, ways=ways), *self._biases()]

    def _name(self, matrix: int) -> str:
        """The stacked gate and up (0) or down matrices (1)."""
        return f"{self.hf}.{self.block.hf_stacked[matrix]}"

    def _biases(self) -> list[LoadItem]:
        """[E, 2 I] and [E, H]; only models whose gate and up alternate have them."""
        if self.gate_up_bias is None or self.down_bias is None:
            return []
        inner, size, rank = self.block.intermediate, self.ranks.size, self.ranks.rank
        halves = (self.gate_up_bias[:, :inner], self.gate_up_bias[:, inner:])
        name = f"{self.hf}.gate_up_proj_bias"
        down = LoadItem(
            f"{self.hf}.down_proj_bias",
            f"{self.gguf}{self.block.gguf_each[2]}.bias",
            self.down_bias,
            cut=self.whole,
        )
        apart = tuple(
            LoadItem("", f"{self.gguf}{each}.bias", half, cut=self._cut(1))
            for each, half in zip(self.block.gguf_each, halves)
        )
        if self.whole is not None:
            together: tuple[LoadItem, ...] = (
                LoadItem(name, "", self.gate_up_bias, ALTERNATING, cut=self.whole),
            )
        else:
            cuts = [Cut(1, (i * size + rank) * inner, inner, 2 * size * inner) for i in range(2)]
            together = tuple(
                LoadItem(name, "", half, ALTERNATING, cut=cut) for half, cut in zip(halves, cuts)
            )
        return [LoadItem(name, "", self.gate_up_bias, ways=(together, apart)), down]

    def _halves(self, stacked: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the gate's and of the up-projection's rows."""
        inner = self.block.intermediate
        return stacked[..., :inner, :], stacked[..., inner:, :]

    def _stacked(self, part: Part | None = None, packed: bool = False) -> tuple[LoadItem, ...]:
        """One tensor [E, 2 I, H], plain or in MXFP4 blocks."""
        inner, size, rank = self.block.intermediate, self.ranks.size, self.ranks.rank
        name = self._name(0)
        scales = f"{name}_scales" if packed else ""
        if self.whole is not None:
            stored = f"{name}_blocks" if packed else name
            return (LoadItem(stored, "", self.gate_up, part, cut=self.whole, scales=scales),)
        return tuple(
            LoadItem(
                f"{name}_blocks" if packed else name,
                "",
                half,
                part,
                cut=Cut(1, (index * size + rank) * inner, inner, 2 * size * inner),
                scales=scales,
            )
            for index, half in enumerate(self._halves(self.gate_up))
        )

    def _each(self) -> tuple[LoadItem, ...]:
        """Two matrices an expert."""
        return tuple(
            LoadItem(f"{self.hf}.{self.start + i}.{name}.weight", "", half, cut=self._slice(0))
            for i in range(self.block.num)
            for name, half in zip(self.block.hf_each, self._halves(self.gate_up[i]))
        )

    def _gguf(self) -> tuple[LoadItem, ...]:
        """Two tensors [E, I, H]."""
        return tuple(
            LoadItem("", f"{self.gguf}{name}.weight", half, cut=self._cut(1))
            for name, half in zip(self.block.gguf_each, self._halves(self.gate_up))
        )

    def _cut(self, dim: int) -> Cut | None:
        """This rank's part of stacked matrices: its experts, or its channels, which lie in dimension ``dim``."""
        return self.whole or self._slice(dim)

    def _slice(self, dim: int) -> Cut | None:
        """This rank's channels, which lie in dimension ``dim``."""
        inner, size = self.block.intermediate, self.ranks.size
        if size == 1 or self.whole is not None:
            return None
        return Cut(dim, self.ranks.rank * inner, inner, size * inner)

    def local_ids(self, device: torch.device) -> Tensor | None:
        """Under expert parallelism, each expert's place here; that of other ranks' experts is the number of ours."""
        if self.whole is None:
            return None
        places = torch.arange(self.whole.total, device=device) - self.start
        return torch.where((places >= 0) & (places < self.block.num), places, self.block.num)

    def elsewhere(self) -> list[str]:
        """Beginnings of the names of other ranks' experts."""
        mine = range(self.start, self.start + self.block.num)
        return [f"{self.hf}.{i}." for i in range(self.block.total) if i not in mine]
