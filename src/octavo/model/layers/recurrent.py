"""A recurrent layer: projections, convolution, recurrence over states in pages, gated norm, projection."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.device.ops.recurrence import CAUSAL_CONV, GATED_NORM, LINEAR_RECURRENCE, Heads, StateRows
from octavo.model.batch import Batch
from octavo.model.blocks import Recurrent
from octavo.model.cache import CachePlace
from octavo.model.layers.build import Build
from octavo.model.layers.linear import LinearLayer, cut_of
from octavo.model.layers.load import LoadItem


class RecurrentLayer:
    """The torch form of ``blocks.Recurrent``; small parameters are float32."""

    def __init__(self, block: Recurrent, build: Build, hf_prefix: str, gguf_prefix: str) -> None:
        self.block = block
        self.ranks = build.ranks
        self.heads = Heads(block.num_key_heads, block.num_heads, block.key_dim, block.value_dim)
        self.project = LinearLayer(block.project, build, hf_prefix, gguf_prefix)
        # Too small to be worth fewer bits, and what they compute is exponentiated.
        self.small = LinearLayer(block.small, build.dense(), hf_prefix, gguf_prefix)
        self.output = LinearLayer(block.output, build, hf_prefix, gguf_prefix)
        self.conv = build.empty(self.heads.channels, block.conv_width, dtype=torch.float32)
        self.conv_bias = build.empty(self.heads.channels, dtype=torch.float32) if block.conv_bias else None
        self.norm = build.empty(block.norm.size, dtype=torch.float32)
        names = [block.dt_bias, block.a_log, *([block.skip] if block.skip is not None else [])]
        self.per_head = [build.empty(part.out_features, dtype=torch.float32) for part in names]
        self.per_head_parts = names
        self.prefixes = (hf_prefix, gguf_prefix)
        self.dtype = build.dtype
        self.convolve = build.binder.bind(CAUSAL_CONV, build.spec)
        self.recur = build.binder.bind(LINEAR_RECURRENCE, build.spec)
        self.gated_norm = build.binder.bind(GATED_NORM, build.spec)
        self.inputs = self.states = torch.empty(0)
        self.group = self.page_size = 0

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        block, heads, tables = self.block, self.heads, batch.groups[self.group]
        rows = StateRows(
            tables.page_table,
            tables.slot_mapping,
            batch.query_start,
            batch.kv_lens,
            batch.max_query,
            self.page_size,
        )
        projected, small = self.project(x), self.small(x)
        mixed = self.convolve(projected[:, : heads.channels], self.conv, self.conv_bias, self.inputs, rows)
        delta = block.kind == "delta"
        y = self.recur(
            mixed,
            small[:, : heads.num],
            small[:, heads.num :] if delta else None,
            self.per_head[1],
            self.per_head[0],
            self.per_head[2] if block.skip is not None else None,
            self.states,
            rows,
            heads,
        )
        gate = projected[:, heads.channels :]
        return self.output(self._normed(y, gate))

    def _normed(self, y: Tensor, gate: Tensor) -> Tensor:
        """The gated norm; one over all heads needs those of the other ranks."""
        block, ranks = self.block, self.ranks
        run = block.norm.size // block.norm_groups
        if block.norm.size <= y.shape[1] or ranks.gather is None:
            out: Tensor = self.gated_norm(y, gate, self.norm, block.norm.eps, run, block.gate_first)
            return out
        whole, gates = ranks.gather(y), ranks.gather(gate.contiguous())
        normed: Tensor = self.gated_norm(whole, gates, self.norm, block.norm.eps, run, block.gate_first)
        return normed.narrow(1, ranks.rank * y.shape[1], y.shape[1]).contiguous()

    def bind(self, place: CachePlace) -> None:
        """Take pages: the last inputs of the convolution [W - 1, C], behind them the states [H, Dk, Dv]."""
        block, heads = self.block, self.heads
        self.inputs = place.typed((block.conv_width - 1, heads.channels), self.dtype)
        shape = (heads.num, heads.key_dim, heads.value_dim)
        self.states = place.typed(shape, torch.float32, block.input_bytes(self.dtype.itemsize))
        self.group = place.group
        self.page_size = place.spec.page_size

    def items(self) -> list[LoadItem]:
        """What the loader must fill."""
        block, (hf, gguf) = self.block, self.prefixes
        found = self.project.items() + self.small.items() + self.output.items()
        row = 0
        for part in block.conv:
            rows = slice(row, row + part.out_features)
            names = (f"{hf}{part.hf}", f"{gguf}{part.gguf}")
            cut = cut_of(part, self.ranks)
            target = self.conv[rows].unsqueeze(1)  # stored [C, 1, W]
            found.append(LoadItem(f"{names[0]}.weight", f"{names[1]}.weight", target, part, cut=cut))
            if self.conv_bias is not None:
                bias = self.conv_bias[rows]
                found.append(LoadItem(f"{names[0]}.bias", f"{names[1]}.bias", bias, part, cut=cut))
            row += part.out_features
        for part, target in zip(self.per_head_parts, self.per_head):
            found.append(LoadItem(hf + part.hf, gguf + part.gguf, target, part, cut=cut_of(part, self.ranks)))
        norm = block.norm
        found.append(LoadItem(f"{hf}{norm.hf}.weight", f"{gguf}{norm.gguf}.weight", self.norm, constant=1.0))
        return found
