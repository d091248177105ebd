"""The indexer of sparse latent attention: keeps a small key a token, and names the keys that each query may see."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from octavo.device.ops.sparse import INDEX_CHOOSE, INDEX_SCORES, INDEX_STORE
from octavo.model.batch import Batch
from octavo.model.blocks import Indexer, Rope
from octavo.model.cache import CachePlace
from octavo.model.layers.build import Build
from octavo.model.layers.linear import LinearLayer
from octavo.model.layers.load import LoadItem
from octavo.model.layers.norm import make_norm
from octavo.model.quantization.dense import DENSE

SCORE_BYTES = (
    128 << 20
)  # of scores at a time, so that memory does not grow with the product of queries and keys


class IndexLayer:
    """See ``blocks.Indexer``; its pages follow the latents' in the same page of the cache."""

    def __init__(self, block: Indexer, rope: Rope, build: Build, hf_prefix: str, gguf_prefix: str) -> None:
        self.block = block
        self.query = LinearLayer(block.query, build, hf_prefix, gguf_prefix)
        self.key = LinearLayer(block.key, build, hf_prefix, gguf_prefix)
        self.key_norm = make_norm(block.key_norm, build, hf_prefix, gguf_prefix)
        plain = replace(build, weight_format=DENSE)  # a few rows that decide much
        self.weights = LinearLayer(block.weights, plain, hf_prefix, gguf_prefix)
        self.cos_sin = build.cos_sin(rope)
        self.store = build.binder.bind(INDEX_STORE, build.spec)
        self.scores = build.binder.bind(INDEX_SCORES, build.spec)
        self.choose = build.binder.bind(INDEX_CHOOSE, build.spec)
        self.scale = (block.num_heads * block.head_dim) ** -0.5
        self.dtype = build.dtype
        self.pages = torch.empty(0)
        self.group = 0

    def __call__(self, x: Tensor, queries: Tensor, batch: Batch) -> Tensor | None:
        """Store this step's keys; the slots [T, top_k] that each query sees, None where that is all keys.

        x [T, E] is the layer's input, ``queries`` [T, rank] the normed latent of its queries.
        """
        block, tables = self.block, batch.groups[self.group]
        q = self.store(
            self.query(queries).view(-1, block.num_heads, block.head_dim),
            self.key_norm(self.key(x)),
            self.cos_sin,
            batch.positions,
            self.pages,
            tables.slot_mapping,
        )
        if batch.max_kv <= block.top_k:
            return None
        weights = self.weights(x).float() * self.scale
        rows, seen = visible(batch)
        tokens = q.shape[0]
        at_once = max(1, SCORE_BYTES // (4 * batch.max_kv))
        parts = []
        for first in range(0, tokens, at_once):
            count = min(at_once, tokens - first)
            scores = self.scores(
                q, weights, self.pages, tables.page_table, rows, seen, batch.max_kv, first, count
            )
            parts.append(
                self.choose(scores, tables.page_table, rows, seen, self.pages.shape[1], block.top_k, first)
            )
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def bind(self, place: CachePlace, first_byte: int) -> None:
        """Take pages [num_pages, P, head_dim] behind the first bytes of each page."""
        self.pages = place.typed((place.spec.page_size, self.block.head_dim), self.dtype, first_byte)
        self.group = place.group

    def items(self) -> list[LoadItem]:
        """What the loader must fill."""
        parts = (self.query, self.key, self.key_norm, self.weights)
        return [item for part in parts for item in part.items()]


def visible(batch: Batch) -> tuple[Tensor, Tensor]:
    """For every token of a step its row and how many keys it sees (0 for padding), both [T] int32; computed once a step."""
    if "visible" not in batch.derived:
        starts = batch.query_start
        token = torch.arange(batch.positions.shape[0], dtype=torch.int32, device=starts.device)
        row = torch.searchsorted(starts[1:].contiguous(), token, right=True)
        real = row < batch.kv_lens.shape[0]
        row = row.clamp(max=batch.kv_lens.shape[0] - 1)
        seen = torch.where(real, batch.kv_lens[row] - (starts[row + 1] - token) + 1, 0)
        batch.derived["visible"] = row.to(torch.int32), seen.to(torch.int32)
    found: tuple[Tensor, Tensor] = batch.derived["visible"]
    return found
