"""Attention over pages: one fused projection, one kernel for norm + rope + store, one for attention, one projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from octavo.device.ops.attention import PAGED_ATTENTION
from octavo.device.ops.rope_store import ROPE_STORE
from octavo.model.batch import Batch
from octavo.model.blocks import Attention
from octavo.model.cache import CachePlace
from octavo.model.layers.build import Build
from octavo.model.layers.cache_scales import CacheScales
from octavo.model.layers.linear import LinearLayer
from octavo.model.layers.load import Cut, LoadItem
from octavo.model.layers.norm import NormLayer


class AttentionLayer:
    """Holds its cache pages (bound later) and the group whose tables it reads."""

    def __init__(self, block: Attention, build: Build, hf_prefix: str, gguf_prefix: str) -> None:
        self.block = block
        self.qkv = LinearLayer(block.qkv, build, hf_prefix, gguf_prefix)
        self.output = LinearLayer(block.output, build, hf_prefix, gguf_prefix)
        self.gate = LinearLayer(block.gate, build, hf_prefix, gguf_prefix) if block.gate else None
        self.q_norm = NormLayer(block.q_norm, build, hf_prefix, gguf_prefix) if block.q_norm else None
        self.k_norm = NormLayer(block.k_norm, build, hf_prefix, gguf_prefix) if block.k_norm else None
        self.sinks = build.empty(block.sinks.out_features, dtype=torch.float32) if block.sinks else None
        self.sink_names = (
            (hf_prefix + block.sinks.hf, gguf_prefix + block.sinks.gguf) if block.sinks else ("", "")
        )
        self.cos_sin = build.cos_sin(block.rope) if block.rope else None
        self.eps = block.q_norm.eps if block.q_norm else block.unit_norm
        # A rotation keeps lengths, so the norm after it is a norm before it with weights of one.
        ones = torch.ones(block.head_dim, device=build.device) if block.unit_norm else None
        self.q_weight = self.q_norm.weight if self.q_norm else ones
        self.k_weight = self.k_norm.weight if self.k_norm else ones
        self.temperatures = temperatures(block, build)
        self.ranks = build.ranks
        # The kernel norms each head; a norm over all heads goes before it.
        self.whole_norms = block.q_norm is not None and block.q_norm.size != block.head_dim
        self.store = build.binder.bind(ROPE_STORE, build.spec)
        self.attend = build.binder.bind(PAGED_ATTENTION, build.spec)
        self.cache_dtype = build.cache_type.dtype or build.dtype
        module = hf_prefix + block.qkv.parts[0].hf.rpartition(".")[0]
        self.scales = CacheScales(module, block, build)
        self.pages = torch.empty(0)
        self.group = 0
        self.leaves_scales = False  # to the norm that follows: the layer around it decides

    @property
    def input(self) -> LinearLayer:
        """The projection that reads what comes in."""
        return self.qkv

    def __call__(self, x: Any, batch: Batch) -> Any:
        """[T, E] from [T, E]; fp8 may come in quantized and go out without its scales."""
        block, tables = self.block, batch.groups[self.group]
        heads_normed = not self.whole_norms
        q = self.store(
            self.qkv.branch(x) if heads_normed else self._normed(self.qkv(x)),
            self.q_weight if heads_normed else None,
            self.k_weight if heads_normed else None,
            self.eps,
            self.cos_sin,
            batch.positions,
            self.pages,
            tables.slot_mapping,
            block.num_heads,
            self.scales.factors,
        )
        if self.temperatures is not None:
            q = (q * self.temperatures[batch.positions].view(-1, 1, 1)).to(q.dtype)
        mixed: Tensor = self.attend(
            q,
            self.pages,
            tables.page_table,
            batch.query_start,
            batch.kv_lens,
            batch.max_query,
            batch.max_kv,
            block.scale,
            block.window,
            block.softcap,
            self.sinks,
            block.chunk,
            self.scales.factors,
        )
        joined = mixed.view(mixed.shape[0], -1)
        if self.gate is not None:
            joined = joined * self.gate(x).sigmoid()
        return self.output.branch(joined) if self.leaves_scales else self.output(joined)

    def bind(self, place: CachePlace) -> None:
        """Take pages [num_pages, 2, Hkv, P, D] in the cache's type."""
        block = self.block
        shape = (2, block.num_kv_heads, place.spec.page_size, block.head_dim)
        self.pages = place.typed(shape, self.cache_dtype)
        self.group = place.group

    def _normed(self, qkv: Tensor) -> Tensor:
        """Queries and keys normed over all their heads together."""
        block = self.block
        q, kv = block.num_heads * block.head_dim, block.num_kv_heads * block.head_dim
        query, key, value = torch.split(qkv, [q, kv, kv], dim=1)
        parts = self.block.qkv.parts
        query = self._whole(query, self.q_norm, parts[0].copies)
        return torch.cat((query, self._whole(key, self.k_norm, parts[1].copies), value), dim=1)

    def _whole(self, x: Tensor, norm: NormLayer | None, copies: int) -> Tensor:
        """The norm over all ranks' heads; ``copies`` neighbouring ranks hold the same ones."""
        if norm is None or self.ranks.gather is None or self.ranks.size == 1:
            return x if norm is None else norm(x)
        tokens, size = x.shape
        joined = self.ranks.gather(x).view(tokens, -1, copies, size)[:, :, 0]
        return norm(joined.reshape(tokens, -1)).narrow(1, self.ranks.rank // copies * size, size)

    def items(self) -> list[LoadItem]:
        """What the loader must fill."""
        norms = [norm.items() for norm in (self.q_norm, self.k_norm) if norm is not None]
        found = self.qkv.items() + self.output.items() + [item for items in norms for item in items]
        if self.gate is not None:
            found += self.gate.items()
        found += self.scales.items()
        if self.sinks is not None:
            heads, ranks = self.sinks.shape[0], self.ranks
            cut = Cut(0, ranks.rank * heads, heads, ranks.size * heads)
            found.append(LoadItem(*self.sink_names, self.sinks, cut=cut))
        return found


def temperatures(block: Attention, build: Build) -> Tensor | None:
    """[max_position] float32: what queries are multiplied by."""
    if block.temperature is None:
        return None
    floor, strength = block.temperature
    positions = torch.arange(1, build.max_position + 1, dtype=torch.float32, device=build.device)
    return 1.0 + strength * torch.log1p(torch.floor(positions / floor))
