"""Sparse latent attention (DeepSeek-AI 2025): an indexer scores all keys cheaply, attention looks at the best of them.

What a query may see is passed on as cache slots (page * page_size + offset), -1 = none, so that attention needs no tables.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.device.ops.bind import Op, triton_rows
from octavo.device.ops.rope_store import rotate


def index_store(
    q: Tensor, key: Tensor, cos_sin: Tensor, positions: Tensor, pages: Tensor, slot_mapping: Tensor
) -> Tensor:
    """Rotate the indexer's queries and keys, write the keys to the cache, return the queries [T, H, D].

    q [T, H, D]; key [T, D]; cos_sin [max_position, dim] float32 (cos, then sin; halves convention, dim <= D); positions
    [T] int64; pages [num_pages, page_size, D]; slot_mapping [T] int64, -1 = do not store.
    """
    rows = cos_sin[positions]
    turned = rotate(key.unsqueeze(1), rows)[:, 0]
    keep = slot_mapping >= 0
    where = slot_mapping[keep]
    pages[where // pages.shape[1], where % pages.shape[1]] = turned[keep].to(pages.dtype)
    return rotate(q, rows)


def index_scores(
    q: Tensor,
    weights: Tensor,
    pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    kv_lens: Tensor,
    max_kv: int,
    first: int,
    count: int,
) -> Tensor:
    """sum_h weights[t, h] relu(q[t, h]·key) of each key up to the token's own, -inf beyond: [count, max_kv] float32.

    Of the tokens from ``first`` on; tokens past query_start[-1] (padding) have -inf everywhere. q [T, H, D]; weights [T, H]
    float32; pages [num_pages, page_size, D]; the rows and tables are those of ``paged_attention``.
    """
    out = torch.full((count, max_kv), float("-inf"), device=q.device)
    starts, lens = query_start.tolist(), kv_lens.tolist()
    for row, kv_len in enumerate(lens):
        begin, end = max(starts[row], first), min(starts[row + 1], first + count)
        if begin >= end:
            continue
        keys = pages[page_table[row, : -(-kv_len // pages.shape[1])].long()].float().flatten(0, 1)[:kv_len]
        products = torch.relu(torch.einsum("thd,kd->thk", q[begin:end].float(), keys))
        scores = torch.einsum("th,thk->tk", weights[begin:end], products)
        last = kv_len - starts[row + 1] + torch.arange(begin, end, device=q.device).unsqueeze(1)
        hidden = torch.arange(kv_len, device=q.device) > last
        out[begin - first : end - first, :kv_len] = scores.masked_fill(hidden, float("-inf"))
    return out


def sparse_attention(
    q: Tensor, pages: Tensor, chosen: Tensor, counts: Tensor, scale: float, latent_dim: int
) -> Tensor:
    """Attention of every token over the latents at its chosen slots.

    q [T, H, latent + rope]; pages [num_pages, page_size, latent + rope]; chosen [T, K] int64 slots, -1 = none; counts [T]:
    the first so many of them at most are slots. Returns [T, H, latent_dim] in q's type, zeros where nothing was chosen.
    """
    out = q.new_zeros((*q.shape[:2], latent_dim))
    for token in range(q.shape[0]):
        slots = chosen[token][chosen[token] >= 0]
        if slots.numel() == 0:
            continue
        keys = pages[slots // pages.shape[1], slots % pages.shape[1]].float()
        weights = torch.softmax(q[token].float() @ keys.T * scale, dim=-1)
        out[token] = (weights @ keys[:, :latent_dim]).to(q.dtype)
    return out


INDEX_STORE = Op("index_store", index_store, triton_rows("sparse:index_store"))
INDEX_SCORES = Op("index_scores", index_scores, triton_rows("sparse:index_scores"))
SPARSE_ATTENTION = Op(
    "sparse_attention",
    sparse_attention,
    triton_rows("sparse:sparse_attention", "sparse_attention_hopper"),
)
