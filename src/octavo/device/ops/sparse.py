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
    rows: Tensor,
    seen: Tensor,
    max_kv: int,
    first: int,
    count: int,
) -> Tensor:
    """sum_h weights[t, h] relu(q[t, h]·key) of the keys that ``count`` tokens from ``first`` on see: [count, max_kv] float32.

    q [T, H, D]; weights [T, H] float32; pages [num_pages, page_size, D]; page_table [R, max_pages] int32; rows [T], seen
    [T] int32: a token's row, and how many keys it sees (0 for padding). Scores beyond those are unspecified.
    """
    out = torch.full((count, max_kv), float("-inf"), device=q.device)
    for index in range(count):
        row, length = int(rows[first + index]), int(seen[first + index])
        keys = pages[page_table[row, : -(-length // pages.shape[1])].long()].float().flatten(0, 1)[:length]
        products = torch.relu(keys @ q[first + index].float().T)
        out[index, :length] = products @ weights[first + index]
    return out


def index_choose(
    scores: Tensor, page_table: Tensor, rows: Tensor, seen: Tensor, page_size: int, top_k: int, first: int
) -> Tensor:
    """Slots [n, top_k] int64 of the keys with the highest of scores [n, max_kv] that the tokens from ``first`` on see.

    -1 where a token sees fewer; in any order; among equal scores any may be chosen.
    """
    count = scores.shape[0]
    at = torch.arange(scores.shape[1], device=scores.device)
    hidden = at >= seen[first : first + count].unsqueeze(1)
    best, positions = scores.masked_fill(hidden, float("-inf")).topk(min(top_k, scores.shape[1]), dim=1)
    page = page_table[rows[first : first + count].long().unsqueeze(1), positions // page_size].long()
    chosen = torch.full((count, top_k), -1, dtype=torch.int64, device=scores.device)
    slots = page * page_size + positions % page_size
    chosen[:, : positions.shape[1]] = torch.where(best == float("-inf"), -1, slots)
    return chosen


def sparse_attention(
    q: Tensor, pages: Tensor, chosen: Tensor, counts: Tensor, scale: float, latent_dim: int
) -> Tensor:
    """Attention of every token over the latents at its chosen slots.

    q [T, H, latent + rope]; pages [num_pages, page_size, latent + rope]; chosen [T, K] int64 slots, -1 = none; counts [T]
    int32: the first so many of them at most are slots. Returns [T, H, latent_dim] in q's type, zeros where nothing was chosen.
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
INDEX_CHOOSE = Op("index_choose", index_choose, triton_rows("sparse:index_choose"))
SPARSE_ATTENTION = Op(
    "sparse_attention",
    sparse_attention,
    triton_rows("sparse:sparse_attention", "sparse_attention_hopper"),
)
