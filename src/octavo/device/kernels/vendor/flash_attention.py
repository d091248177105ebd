"""FlashAttention 3 (Shah et al. 2024) over our pages, for steps with prompts; decodes stay with our own kernel."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

from octavo.device.kernels.triton.attention import PagedAttentionHopper

Attend = Callable[..., Tensor]


class FlashAttention3:
    """``octavo.device.ops.attention.paged_attention``; ``vendor`` is ``flash_attn_interface.flash_attn_with_kvcache``.

    ``ours`` takes what that does not cover: sinks, chunks, a cache of another type than the queries, float32, and steps of
    decodes, which it is faster at.
    """

    def __init__(self, vendor: Attend, ours: Attend) -> None:
        self.vendor = vendor
        self.ours = ours

    def __call__(
        self,
        q: Tensor,
        kv_pages: Tensor,
        page_table: Tensor,
        query_start: Tensor,
        kv_lens: Tensor,
        max_query: int,
        max_kv: int,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        chunk: int = 0,
    ) -> Tensor:
        """Same arguments and result as the op."""
        is_covered = sinks is None and not chunk and kv_pages.dtype == q.dtype and q.element_size() == 2
        if max_query == 1 or not is_covered or not q.shape[0]:
            return self.ours(
                q,
                kv_pages,
                page_table,
                query_start,
                kv_lens,
                max_query,
                max_kv,
                scale,
                window,
                softcap,
                sinks,
                chunk,
            )
        keys, values = kv_pages.transpose(2, 3).unbind(1)  # [pages, page_size, Hkv, D], no copy
        options: dict[str, Any] = {
            "cache_seqlens": kv_lens,
            "page_table": page_table,
            "cu_seqlens_q": query_start,
            "max_seqlen_q": max_query,
            "softmax_scale": scale,
            "causal": True,
            "window_size": (window - 1, 0) if window else (-1, -1),
            "softcap": softcap,
        }
        return self.vendor(q, keys, values, **options)


def flash_attention_3() -> FlashAttention3:
    """Bound to the package as it is installed here."""
    return FlashAttention3(
        import_module("flash_attn_interface").flash_attn_with_kvcache, PagedAttentionHopper()
    )
