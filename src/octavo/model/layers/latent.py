"""Latent attention over pages: two small projections, one kernel that stores, one that attends, absorbed heads between.

Multiplications of a query with a key of one head: absorbed latent + rope for the score and latent for the value (V3: 1088),
in full heads nope + rope and value (320), but those need K_h c and V_h c of each key first (131072 more a key).
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.device.ops.latent import LATENT_ATTENTION, LATENT_STORE
from octavo.model.batch import Batch
from octavo.model.blocks import LatentAttention
from octavo.model.cache import CachePlace
from octavo.model.layers.build import Build
from octavo.model.layers.linear import LinearLayer
from octavo.model.layers.load import Cut, LoadItem
from octavo.model.layers.norm import NormLayer


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
        self.cache_dtype = build.dtype
        self.pages = torch.empty(0)
        self.group = 0

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        block, tables = self.block, batch.groups[self.group]
        down = self.down(x)
        if self.query_norm is None:
            q, compressed = self.query(x), down
        else:
            queries, compressed = torch.split(
                down, [self.query_norm.weight.shape[0], block.latent_dim + block.rope_dim], dim=1
            )
            q = self.query(self.query_norm(queries))
        q = q.view(-1, block.num_heads, block.nope_dim + block.rope_dim)
        wide: Tensor = self.store(
            q,
            compressed,
            self.latent_norm.weight,
            self.latent_norm.eps,
            self.cos_sin,
            batch.positions,
            self.pages,
            tables.slot_mapping,
        )
        self.up.absorb(q[..., : block.nope_dim], wide[..., : block.latent_dim])
        mixed: Tensor = self.attend(
            wide,
            self.pages,
            tables.page_table,
            batch.query_start,
            batch.kv_lens,
            batch.max_query,
            batch.max_kv,
            block.scale,
            block.latent_dim,
        )
        return self.output(self.up.values(mixed).flatten(1))

    def bind(self, place: CachePlace) -> None:
        """Take pages [num_pages, P, latent + rope] in the type of activations."""
        shape = (place.spec.page_size, self.block.latent_dim + self.block.rope_dim)
        self.pages = place.typed(shape, self.cache_dtype)
        self.group = place.group

    def items(self) -> list[LoadItem]:
        """What the loader must fill."""
        norms = self.query_norm.items() if self.query_norm is not None else []
        parts = (self.down, self.query, self.latent_norm, self.up, self.output)
        return norms + [item for part in parts for item in part.items()]


class UpProjection:
    """K_h and V_h of this rank's heads in one tensor [H, nope + value, latent], in the run type whatever the format."""

    def __init__(self, block: LatentAttention, build: Build, hf_prefix: str, gguf_prefix: str) -> None:
        self.block = block
        self.ranks = build.ranks
        self.matrix = build.empty(block.num_heads, block.nope_dim + block.value_dim, block.latent_dim)
        self.keys = self.matrix.narrow(1, 0, block.nope_dim)
        self.of_values = self.matrix.narrow(1, block.nope_dim, block.value_dim)
        part = block.up.parts[0]
        self.names = (f"{hf_prefix}{part.hf}.weight", f"{gguf_prefix}{part.gguf}.weight")
        self.split_names = [f"{gguf_prefix}{name}.weight" for name in block.split_up]

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
