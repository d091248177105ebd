"""Where a layer's part of the cache lies, and how it becomes typed pages.

The runner owns the bytes and knows no cache kind; each layer takes its ``CachePlace`` and sees it as it likes: keys
and values, latents, or recurrent state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.engine.cache.spec import KVSpec


@dataclass(frozen=True)
class CachePlace:
    """One layer's pages: ``raw`` [num_pages, page_bytes] uint8 is shared with the layers of other groups at the same
    position, ``group`` says whose page table to read, ``spec`` how many tokens a page holds. ``more``: the places of
    the layer's further kinds of cache, in its order."""

    raw: Tensor
    group: int
    spec: KVSpec
    more: tuple[CachePlace, ...] = ()

    def typed(self, shape: tuple[int, ...], dtype: torch.dtype, first_byte: int = 0) -> Tensor:
        """A view [num_pages, *shape] of each page's bytes from ``first_byte`` on; the rest of a page is a gap."""
        typed = self.raw[:, first_byte:].view(dtype) if first_byte else self.raw.view(dtype)
        strides = [1]
        for size in reversed(shape[1:]):
            strides.insert(0, strides[0] * size)
        return typed.as_strided((typed.shape[0], *shape), (typed.stride(0), *strides), typed.storage_offset())
