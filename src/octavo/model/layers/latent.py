"""Latent attention over pages: two small projections, one kernel that stores, then one of two ways to attend.

Multiplications by one head, in general and for DeepSeek-V3 (latent 512, rope 64, nope 128, value 128):

                       a query and a key it sees               once
    absorbed           2 latent + rope             1088        latent (nope + value)  131072   a query
    in full heads      nope + rope + value          320        latent (nope + value)  131072   a key

So a chunk of at least 171 queries is cheaper in full heads whatever stands before it, a whole prompt always, a decode
never. Recorded steps, whose rows change from replay to replay, absorb.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.device.ops.latent import LATENT_ATTENTION, LATENT_PREFILL, LATENT_STORE, prefill_bytes
from octavo.device.ops.sparse import SPARSE_ATTENTION
from octavo.model.batch import Batch, Prompts
from octavo.model.blocks import LatentAttention
from octavo.model.cache import CachePlace
from octavo.model.layers.build import Build
from octavo.model.layers.indexer import IndexLayer, visible
from octavo.model.layers.linear import LinearLayer
from octavo.model.layers.load import Cut, LoadItem
from octavo.model.layers.norm import NormLayer
from octavo.model.quantization.choose import CheckpointFormat
from octavo.model.quantization.dense import DenseWeight
from octavo.model.quantization.whole import whole

WORK_BYTES = 512 << 20  # of a model on a GPU: room for 167,000 keys of DeepSeek-V3 in full heads


@dataclass
class Rows:
    """Rows of a step that one kernel call serves; ``tokens`` [n] int64 are theirs (None = the whole step)."""

    tokens: Tensor | None
    page_table: Tensor
    query_start: Tensor
    kv_lens: Tensor
    max_query: int
    max_kv: int


@dataclass
class LongRows:
    """What ``latent_prefill`` asks of the rows with many queries."""

    slots: Tensor
    begins: Tensor
    first_query: Tensor
    first_key: Tensor


class LatentLayer:
    """Holds its cache pages (bound later) and the group whose tables it reads; see ``blocks.LatentAttention``."""

    def __init__(self, block: LatentAttention, build: Build, hf_prefix: str, gguf_prefix: str) -> None:
        self.block = block
        self.down = LinearLayer(block.down, build, hf_prefix, gguf_prefix)
        self.query = LinearLayer(block.query, build, hf_prefix, gguf_prefix)
        self.query_norm = (
            NormLayer(block.query_norm, build, hf_prefix, gguf_prefix) if block.query_norm else None
        )
        self.latent_norm = NormLayer(block.latent_norm, build, hf_prefix, gguf_prefix)
        self.up = UpProjection(block, build, hf_prefix, gguf_prefix)
        self.output = LinearLayer(block.output, build, hf_prefix, gguf_prefix)
        self.cos_sin = build.cos_sin(block.rope)
        self.store = build.binder.bind(LATENT_STORE, build.spec)
        self.attend = build.binder.bind(LATENT_ATTENTION, build.spec)
        self.prefill = build.binder.bind(LATENT_PREFILL, build.spec)
        self.indexer = (
            IndexLayer(block.indexer, block.rope, build, hf_prefix, gguf_prefix) if block.indexer else None
        )
        self.attend_chosen = build.binder.bind(SPARSE_ATTENTION, build.spec) if block.indexer else None
        self.build = build
        self.pages = torch.empty(0)
        self.work = torch.empty(0)
        self.group = 0

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        block = self.block
        compressed = self.down(x)
        queries = x
        if self.query_norm is not None:
            queries, compressed = torch.split(
                compressed, [self.query_norm.weight.shape[0], block.latent_dim + block.rope_dim], dim=1
            )
            queries = self.query_norm(queries)
        q = self.query(queries).view(-1, block.num_heads, block.nope_dim + block.rope_dim)
        wide: Tensor = self.store(
            q,
            compressed,
            self.latent_norm.weight,
            self.latent_norm.eps,
            self.cos_sin,
            batch.positions,
            self.pages,
            batch.groups[self.group].slot_mapping,
        )
        chosen = self.indexer(x, queries, batch) if self.indexer is not None else None
        if chosen is not None:
            mixed = self._over(chosen, q, wide, batch)
        elif batch.prompts is not None and self._full_heads_are_cheaper(batch.prompts):
            mixed = self._in_full_heads(q, wide, batch, batch.prompts)
        else:
            table = batch.groups[self.group].page_table
            rows = Rows(None, table, batch.query_start, batch.kv_lens, batch.max_query, batch.max_kv)
            mixed = self._absorbed(q, wide, rows)
        return self.output(mixed.flatten(1))

    def _full_heads_are_cheaper(self, prompts: Prompts) -> bool:
        """By multiplications of the rows with many queries (see above), and only where the workspace has room."""
        block = self.block
        both, width = block.nope_dim + block.value_dim, block.latent_dim + block.rope_dim
        once, saved = block.latent_dim * both, block.latent_dim + width - both - block.rope_dim
        if prompts.num_pairs * saved <= (prompts.num_keys - prompts.num_queries) * once:
            return False
        needed = prefill_bytes(prompts.num_keys, width, both, self.build.dtype.itemsize)
        return self.build.spec.device == "cpu" or needed <= self.work.numel()

    def _absorbed(self, q: Tensor, wide: Tensor, rows: Rows) -> Tensor:
        """[n, H, value] of the rows' tokens, by comparing queries with latents."""
        block = self.block
        if rows.tokens is not None:
            q, wide = q[rows.tokens], wide[rows.tokens]
        self.up.absorb(q[..., : block.nope_dim], wide[..., : block.latent_dim])
        mixed: Tensor = self.attend(
            wide,
            self.pages,
            rows.page_table,
            rows.query_start,
            rows.kv_lens,
            rows.max_query,
            rows.max_kv,
            block.scale,
            block.latent_dim,
        )
        return self.up.values(mixed)

    def _over(self, chosen: Tensor, q: Tensor, wide: Tensor, batch: Batch) -> Tensor:
        """[T, H, value], by comparing queries with the chosen latents."""
        block = self.block
        if self.attend_chosen is None:
            raise ValueError("only an indexer chooses keys")
        self.up.absorb(q[..., : block.nope_dim], wide[..., : block.latent_dim])
        _, seen = visible(batch)
        return self.up.values(
            self.attend_chosen(wide, self.pages, chosen, seen, block.scale, block.latent_dim)
        )

    def _in_full_heads(self, q: Tensor, wide: Tensor, batch: Batch, prompts: Prompts) -> Tensor:
        """[T, H, value]: rows with many queries in full heads, single tokens absorbed."""
        key = f"latent {self.group}"
        if key not in batch.derived:  # the same for all layers of the group
            size = self.pages.shape[1]
            batch.derived[key] = (
                long_rows(batch, prompts, self.group, size),
                single_rows(batch, prompts, self.group),
            )
        longer, singles = batch.derived[key]
        out = q.new_empty((*q.shape[:2], self.block.value_dim))
        self.prefill(
            out,
            q,
            wide,
            self.up.matrix,
            self.pages,
            longer.slots,
            longer.begins,
            longer.first_query,
            longer.first_key,
            self.block.scale,
            self.work,
        )
        if singles.tokens.shape[0]:
            out[singles.tokens] = self._absorbed(q, wide, singles)
        return out

    def bind(self, place: CachePlace) -> None:
        """Take pages [num_pages, P, latent + rope] in the type of activations, and the workspace of all layers."""
        shape = (place.spec.page_size, self.block.latent_dim + self.block.rope_dim)
        self.pages = place.typed(shape, self.build.dtype)
        self.group = place.group
        self.up.decode()
        if self.indexer is not None:
            self.indexer.bind(place, shape[0] * shape[1] * self.build.dtype.itemsize)
        if self.build.spec.device != "cpu":
            if "latent work" not in self.build.shared:
                self.build.shared["latent work"] = self.build.empty(WORK_BYTES, dtype=torch.uint8)
            self.work = self.build.shared["latent work"]

    def items(self) -> list[LoadItem]:
        """What the loader must fill."""
        norms = self.query_norm.items() if self.query_norm is not None else []
        parts = (self.down, self.query, self.latent_norm, self.up, self.output)
        norms += self.indexer.items() if self.indexer is not None else []
        return norms + [item for part in parts for item in part.items()]


def single_rows(batch: Batch, prompts: Prompts, group: int) -> Rows:
    """The rows with one query."""
    rows = prompts.singles
    return Rows(
        batch.query_start[rows].long(),
        batch.groups[group].page_table[rows],
        torch.arange(rows.shape[0] + 1, dtype=torch.int32, device=rows.device),
        batch.kv_lens[rows],
        1,
        batch.max_kv,
    )


def long_rows(batch: Batch, prompts: Prompts, group: int, page_size: int) -> LongRows:
    """The rows with more queries: where they begin, and the slot of every key."""
    rows = prompts.longer
    begins, lens = batch.query_start[rows], batch.kv_lens[rows]
    counts = batch.query_start[rows + 1] - begins
    first_query, first_key = (
        torch.nn.functional.pad(numbers.cumsum(0, dtype=torch.int32), (1, 0)) for numbers in (counts, lens)
    )
    at = torch.arange(prompts.num_keys, dtype=torch.int32, device=rows.device)
    owner = torch.searchsorted(first_key, at, right=True) - 1
    position = (at - first_key[owner]).long()
    page = batch.groups[group].page_table[rows[owner], position // page_size].long()
    return LongRows(page * page_size + position % page_size, begins, first_query, first_key)


class UpProjection:
    """K_h and V_h of this rank's heads in one tensor [H, nope + value, latent], in the run type whatever files hold.

    They are multiplied from both sides, which quantized matrices cannot be: what a checkpoint holds quantized is loaded as
    it is, and decoded once when the cache is bound.
    """

    def __init__(self, block: LatentAttention, build: Build, hf_prefix: str, gguf_prefix: str) -> None:
        self.block = block
        self.ranks = build.ranks
        self.dtype = build.dtype
        self.shape = (block.num_heads, block.nope_dim + block.value_dim, block.latent_dim)
        self.quantized: LinearLayer | None = None
        if isinstance(build.weight_format, CheckpointFormat):
            stored = LinearLayer(block.up, build, hf_prefix, gguf_prefix)
            self.quantized = None if isinstance(stored.weight, DenseWeight) else stored
        if self.quantized is None:
            self._split(build.empty(*self.shape))
        part = block.up.parts[0]
        self.names = (f"{hf_prefix}{part.hf}.weight", f"{gguf_prefix}{part.gguf}.weight")
        self.split_names = [f"{gguf_prefix}{name}.weight" for name in block.split_up]

    def _split(self, matrix: Tensor) -> None:
        """Take the whole, and views of its two kinds of rows."""
        self.matrix = matrix
        self.keys = matrix.narrow(1, 0, self.block.nope_dim)
        self.of_values = matrix.narrow(1, self.block.nope_dim, self.block.value_dim)

    def decode(self) -> None:
        """Replace quantized weights by what they stand for."""
        if self.quantized is not None:
            self._split(whole(self.quantized.weight).to(self.dtype).view(self.shape))
            self.quantized = None

    def absorb(self, q: Tensor, out: Tensor) -> None:
        """out [T, H, latent] = K_h^T q of q [T, H, nope]; both may be slices of wider heads."""
        torch.bmm(q.transpose(0, 1), self.keys, out=out.transpose(0, 1))

    def values(self, mixed: Tensor) -> Tensor:
        """V_h of mixed [T, H, latent]: [T, H, value]."""
        out = mixed.new_empty((*mixed.shape[:2], self.block.value_dim))
        torch.bmm(mixed.transpose(0, 1), self.of_values.transpose(1, 2), out=out.transpose(0, 1))
        return out

    def items(self) -> list[LoadItem]:
        """What the loader must fill; GGUF files hold keys (transposed) and values together or apart."""
        if self.quantized is not None:
            return self.quantized.items()
        flat, heads = self.matrix.flatten(0, 1), self.block.num_heads
        whole = LoadItem(*self.names, flat, cut=self._cut(flat.shape[0]))
        apart = tuple(
            LoadItem("", name, target, cut=self._cut(heads))
            for name, target in zip(self.split_names, (self.keys.transpose(1, 2), self.of_values))
        )
        return [LoadItem(*self.names, flat, ways=((whole,), apart))]

    def _cut(self, size: int) -> Cut | None:
        """This rank's heads in dimension 0, of which it holds ``size`` entries."""
        ranks = self.ranks
        return Cut(0, ranks.rank * size, size, ranks.size * size) if ranks.size > 1 else None
