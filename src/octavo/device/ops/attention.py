"""Paged attention over rows of any length (Kwon et al. 2023): prefill chunks and decodes are the same op."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.device.ops.bind import Implementation, Op, OpSpec, triton_rows


def paged_attention(
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
    kv_scales: Tensor | None = None,
) -> Tensor:
    """Causal attention of each row's new tokens over its cached keys (the new ones are stored already).

    q [T, Hq, D]; kv_pages [pages, 2, Hkv, page_size, D]; page_table [R, max_pages] int32 (entries before the window
    may be stale); query_start [R + 1] int32: row r's queries are q[query_start[r]:query_start[r + 1]], the last of
    them at position kv_lens[r] - 1; kv_lens [R] int32 counts keys including the new ones. Rows with no queries are
    skipped, as are tokens of q past query_start[-1] (padding; their output is unspecified). ``max_query`` and
    ``max_kv`` are host-side upper bounds of the row lengths. ``window`` > 0: a query sees itself and the window - 1
    keys before it; ``chunk`` > 0 (and no window): those of its own chunk of so many positions. ``softcap`` > 0: scores become softcap * tanh(score / softcap). ``sinks`` [Hq]: an extra logit
    per head that takes probability but has no value. ``kv_scales`` [2, Hkv] float32: what each head's keys and values were
    divided by when they were stored. Returns [T, Hq, D] in q's type.
    """
    out = torch.zeros_like(q)
    num_heads = q.shape[1]
    num_kv_heads, page_size, head_dim = kv_pages.shape[2:]
    starts, lens = query_start.tolist(), kv_lens.tolist()
    for row, kv_len in enumerate(lens):
        begin, end = starts[row], starts[row + 1]
        if begin == end:
            continue
        count = end - begin
        first = first_visible(kv_len - count, window, chunk) // page_size
        pages = page_table[row, first : -(-kv_len // page_size)].long()
        keys, values = read_pages(kv_pages, pages).transpose(0, 1).unbind(0)  # [n, Hkv, P, D]
        if kv_scales is not None:
            keys, values = keys * kv_scales[0, :, None, None], values * kv_scales[1, :, None, None]
        base = first * page_size
        keys = keys.transpose(1, 2).reshape(-1, num_kv_heads, head_dim)[: kv_len - base]
        values = values.transpose(1, 2).reshape(-1, num_kv_heads, head_dim)[: kv_len - base]
        query = q[begin:end].float().view(count, num_kv_heads, num_heads // num_kv_heads, head_dim)
        scores = torch.einsum("thgd,khd->hgtk", query, keys) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        query_at = torch.arange(kv_len - count, kv_len, device=q.device).unsqueeze(1)
        key_at = torch.arange(base, kv_len, device=q.device).unsqueeze(0)
        scores = scores.masked_fill(hidden_keys(query_at, key_at, window, chunk), float("-inf"))
        if sinks is not None:
            sink = sinks.float().view(num_kv_heads, -1, 1, 1).expand(-1, -1, count, 1)
            weights = torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1]
        else:
            weights = torch.softmax(scores, dim=-1)
        mixed = torch.einsum("hgtk,khd->thgd", weights, values)
        out[begin:end] = mixed.reshape(count, num_heads, head_dim).to(q.dtype)
    return out


def read_pages(kv_pages: Tensor, pages: Tensor) -> Tensor:
    """Some pages in float32; 8-bit floats know no indexing of their own."""
    if kv_pages.element_size() == 1:
        return kv_pages.view(torch.uint8)[pages].view(kv_pages.dtype).float()
    return kv_pages[pages].float()


def first_visible(position: int, window: int, chunk: int) -> int:
    """The first key that the query at ``position`` sees."""
    if chunk:
        return position // chunk * chunk
    return max(0, position - window + 1) if window else 0


def hidden_keys(query_at: Tensor, key_at: Tensor, window: int, chunk: int) -> Tensor:
    """Which keys a query does not see, by position [t, 1] and [1, k]."""
    hidden = key_at > query_at
    if window:
        hidden |= key_at <= query_at - window
    if chunk:
        hidden |= key_at < query_at // chunk * chunk
    return hidden


def _suits_flash_attention_3(spec: OpSpec) -> bool:
    return spec.device == "cuda" and 90 <= spec.capability < 100 and spec.dtype in ("float16", "bfloat16")


FLASH_ATTENTION_3 = Implementation(
    "flash-attention-3",
    "octavo.device.kernels.vendor.flash_attention:flash_attention_3",
    _suits_flash_attention_3,
    requires="flash_attn_interface",
    factory=True,
    vendor=True,
)
PAGED_ATTENTION = Op(
    "paged_attention",
    paged_attention,
    (
        FLASH_ATTENTION_3,
        *triton_rows("attention:PagedAttention", "PagedAttentionHopper", factory=True),
    ),
)
