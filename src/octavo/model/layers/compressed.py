"""Compressed attention over pages: a window of tokens, entries that stand for several tokens, an indexer that chooses some."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.device.ops.compressed import (
    COMPRESS,
    COMPRESSED_ATTENTION,
    HEAD_STORE,
    PIECE_STORE,
    ROTATE_PAIRS,
)
from octavo.device.ops.sparse import INDEX_CHOOSE, INDEX_SCORES
from octavo.model.batch import Batch
from octavo.model.blocks import CompressedAttention, Compressor, EntryIndexer, Linear, Rope
from octavo.model.cache import CachePlace
from octavo.model.layers.build import Build
from octavo.model.layers.indexer import SCORE_BYTES, visible
from octavo.model.layers.linear import LinearLayer
from octavo.model.layers.load import Cut, LoadItem
from octavo.model.layers.norm import NormLayer
from octavo.model.quantization.choose import CheckpointFormat
from octavo.model.quantization.dense import DenseWeight
from octavo.model.quantization.whole import whole


class CompressedLayer:
    """The torch form of ``blocks.CompressedAttention``; every rank keeps the whole cache, which belongs to all heads."""

    def __init__(self, block: CompressedAttention, build: Build, hf_prefix: str, gguf_prefix: str) -> None:
        names = (build, hf_prefix, gguf_prefix)
        self.block = block
        self.build = build
        self.down = LinearLayer(block.down, *names)
        self.query_norm = NormLayer(block.query_norm, *names)
        self.query = LinearLayer(block.query, *names)
        self.key_norm = NormLayer(block.key_norm, *names)
        self.grouped = GroupedLinear(block, build, hf_prefix, gguf_prefix)
        self.output = LinearLayer(block.output, *names)
        self.sinks = build.empty(block.num_heads, dtype=torch.float32)
        self.sink_names = (hf_prefix + block.sinks.hf, gguf_prefix + block.sinks.gguf)
        self.cos_sin = build.cos_sin(block.rope)
        # All compressors' pieces in one product, as they lie in one page.
        parts = tuple(part for each in block.compressors() for part in each.project.parts)
        pieces = Linear(block.down.in_features, parts)
        self.pieces = LinearLayer(pieces, build.dense(), hf_prefix, gguf_prefix) if parts else None
        self.compressors: list[CompressorLayer] = []
        for each in block.compressors():
            first = sum(2 * done.block.width for done in self.compressors)
            self.compressors.append(CompressorLayer(each, first, block.rope, *names))
        self.indexer = EntryIndexLayer(block.indexer, block.rope, *names) if block.indexer else None
        self.head_store = build.binder.bind(HEAD_STORE, build.spec)
        self.rotate = build.binder.bind(ROTATE_PAIRS, build.spec)
        self.piece_store = build.binder.bind(PIECE_STORE, build.spec)
        self.attend = build.binder.bind(COMPRESSED_ATTENTION, build.spec)
        self.pages = self.piece_pages = torch.empty(0)
        self.group = self.piece_group = 0

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        block, tables = self.block, batch.groups[self.group]
        queries, key = torch.split(self.down(x), [block.query_norm.size, block.head_dim], dim=1)
        queries = self.query_norm(queries)
        q = self.head_store(
            self.query(queries).view(-1, block.num_heads, block.head_dim),
            key,
            self.key_norm.weight,
            self.key_norm.eps,
            self.cos_sin,
            batch.positions,
            self.pages,
            tables.slot_mapping,
        )
        rows, seen = visible(batch)
        entries, entry_table, rate, chosen = None, None, 1, None
        if self.pieces is not None:
            self._compress(self.pieces(x), batch)
            first = self.compressors[0]
            entries, rate = first.entries, first.block.rate
            entry_table = batch.groups[first.group].page_table
            if self.indexer is not None:
                chosen = self.indexer(x, queries, self.compressors[1], first, batch)
        mixed: Tensor = self.attend(
            q,
            self.pages,
            tables.page_table,
            block.window,
            entries,
            entry_table,
            rate,
            chosen,
            rows,
            seen,
            batch.max_kv,
            block.scale,
            self.sinks,
        )
        turned = self.rotate(mixed, self.cos_sin, batch.positions, True)
        return self.output(self.grouped(turned))

    def _compress(self, pieces: Tensor, batch: Batch) -> None:
        """Keep this step's pieces, and make the entries that they complete."""
        tables = batch.groups[self.piece_group]
        self.piece_store(pieces, self.piece_pages, tables.slot_mapping)
        for compressor in self.compressors:
            compressor(self.piece_pages, tables.page_table, batch)

    def bind(self, place: CachePlace) -> None:
        """Take the window's pages [num_pages, P, D], those of pieces, and those of each compressor's entries."""
        block, dtype = self.block, self.build.dtype
        self.grouped.decode()
        self.pages = place.typed((place.spec.page_size, block.head_dim), dtype)
        self.group = place.group
        if self.compressors:
            pieces, *entries = place.more
            width = sum(2 * each.block.width for each in self.compressors)
            self.piece_pages = pieces.typed((pieces.spec.page_size, width), dtype)
            self.piece_group = pieces.group
            for compressor, home in zip(self.compressors, entries, strict=True):
                compressor.bind(home)

    def items(self) -> list[LoadItem]:
        """What the loader must fill."""
        parts = (self.down, self.query_norm, self.query, self.key_norm, self.grouped, self.output)
        optional = (self.pieces, *self.compressors, self.indexer)
        found = [item for part in (*parts, *optional) if part is not None for item in part.items()]
        heads, ranks = self.block.num_heads, self.build.ranks
        cut = Cut(0, ranks.rank * heads, heads, ranks.size * heads) if ranks.size > 1 else None
        return [*found, LoadItem(*self.sink_names, self.sinks, cut=cut)]


class GroupedLinear:
    """Each group of heads by its own matrix, for which it must be plain: what a checkpoint holds quantized is loaded as it
    is, and decoded once when the cache is bound."""

    def __init__(self, block: CompressedAttention, build: Build, hf_prefix: str, gguf_prefix: str) -> None:
        self.num_groups = block.num_groups
        self.dtype = build.dtype
        kept = build if isinstance(build.weight_format, CheckpointFormat) else build.dense()
        self.stored: LinearLayer | None = LinearLayer(block.grouped, kept, hf_prefix, gguf_prefix)
        self.name = f"{hf_prefix}{block.grouped.parts[0].hf}.weight"
        self.matrix = torch.empty(0)

    def decode(self) -> None:
        """Take the matrix [groups * rank, heads / groups * head_dim] in the run type, and let go of codes."""
        if self.stored is not None:
            plain = isinstance(self.stored.weight, DenseWeight)
            self.matrix = whole(self.stored.weight).to(self.dtype)
            self.stored = self.stored if plain else None

    def __call__(self, mixed: Tensor) -> Tensor:
        """[T, groups * rank] of the heads [T, H, D]."""
        by_group = mixed.reshape(mixed.shape[0], self.num_groups, -1).transpose(0, 1)
        matrices = self.matrix.view(self.num_groups, -1, self.matrix.shape[1]).transpose(1, 2)
        return torch.bmm(by_group, matrices).transpose(0, 1).flatten(1)

    def items(self) -> list[LoadItem]:
        """What the loader must fill; of codes that are decoded nothing is left but the matrix."""
        return self.stored.items() if self.stored is not None else [LoadItem(self.name, "", self.matrix)]


class CompressorLayer:
    """Makes entries of pieces, its own of which begin at ``first``; see ``blocks.Compressor``."""

    def __init__(
        self, block: Compressor, first: int, rope: Rope, build: Build, hf_prefix: str, gguf_prefix: str
    ) -> None:
        self.block = block
        self.first = first
        self.bias = build.empty(block.rate, block.width, dtype=torch.float32)
        self.names = (hf_prefix + block.bias.hf, gguf_prefix + block.bias.gguf)
        self.norm = NormLayer(block.norm, build, hf_prefix, gguf_prefix)
        self.cos_sin = build.cos_sin(rope)
        self.compress = build.binder.bind(COMPRESS, build.spec)
        self.dtype = build.dtype
        self.entries = torch.empty(0)
        self.group = 0

    def __call__(self, pieces: Tensor, piece_table: Tensor, batch: Batch) -> None:
        rows, seen = visible(batch)
        self.compress(
            pieces,
            piece_table,
            self.first,
            self.bias,
            self.norm.weight,
            self.norm.eps,
            self.cos_sin,
            rows,
            seen,
            self.entries,
            batch.groups[self.group].page_table,
        )

    def bind(self, place: CachePlace) -> None:
        """Take pages [num_pages, entries a page, D]."""
        shape = (place.spec.page_size // self.block.rate, self.block.head_dim)
        self.entries = place.typed(shape, self.dtype)
        self.group = place.group

    def items(self) -> list[LoadItem]:
        """What the loader must fill; the projection is the layer's."""
        return [LoadItem(*self.names, self.bias), *self.norm.items()]


class EntryIndexLayer:
    """See ``blocks.EntryIndexer``."""

    def __init__(
        self, block: EntryIndexer, rope: Rope, build: Build, hf_prefix: str, gguf_prefix: str
    ) -> None:
        self.block = block
        self.query = LinearLayer(block.query, build, hf_prefix, gguf_prefix)
        self.weights = LinearLayer(block.weights, build.dense(), hf_prefix, gguf_prefix)
        self.cos_sin = build.cos_sin(rope)
        self.rotate = build.binder.bind(ROTATE_PAIRS, build.spec)
        self.scores = build.binder.bind(INDEX_SCORES, build.spec)
        self.choose = build.binder.bind(INDEX_CHOOSE, build.spec)
        self.scale = (block.num_heads * block.compressor.head_dim) ** -0.5
        self.most = build.max_position // block.compressor.rate

    def __call__(
        self, x: Tensor, queries: Tensor, keys: CompressorLayer, values: CompressorLayer, batch: Batch
    ) -> Tensor | None:
        """Slots [T, top_k] of the entries of ``values`` whose index ``keys`` score best; None where all are always seen.

        That does not go by the step's lengths, so that short and long sequences run the same kernels.
        """
        block = self.block
        if self.most <= block.top_k:
            return None
        most = max(1, batch.max_kv // keys.block.rate)
        flat = self.query(queries).view(-1, block.num_heads, keys.block.head_dim)
        q = self.rotate(flat, self.cos_sin, batch.positions)
        weights = self.weights(x).float() * self.scale
        rows, seen = visible(batch)
        whole = (seen // keys.block.rate).to(torch.int32)
        key_table, table = batch.groups[keys.group].page_table, batch.groups[values.group].page_table
        at_once = max(1, SCORE_BYTES // (4 * most))
        parts = []
        for first in range(0, q.shape[0], at_once):
            count = min(at_once, q.shape[0] - first)
            scores = self.scores(q, weights, keys.entries, key_table, rows, whole, most, first, count)
            parts.append(self.choose(scores, table, rows, whole, values.entries.shape[1], block.top_k, first))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def items(self) -> list[LoadItem]:
        """What the loader must fill."""
        return self.query.items() + self.weights.items()
