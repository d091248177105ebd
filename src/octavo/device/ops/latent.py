"""Latent attention (DeepSeek-AI 2024): what is cached of a token is one latent for all heads and one rotated key.

Queries are compared with latents themselves ("absorbed"): q_h·K_h c = (K_h^T q_h)·c, and the sum of weighted values is
V_h times the sum of weighted latents, so the step that is bound by memory reads each page once for all heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.device.ops.bind import Op, triton_rows
from octavo.device.ops.norm import rms_norm
from octavo.device.ops.rope_store import rotate


def latent_store(
    q: Tensor,
    compressed: Tensor,
    weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    pages: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """Norm the latents, rotate keys and queries, write latents and keys to the cache; returns the queries' new home.

    q [T, H, nope + rope]; compressed [T, latent + rope]; weight [latent]; cos_sin [max_position, rope] float32 (cos,
    then sin; halves convention); positions [T] int64; pages [num_pages, page_size, latent + rope]; slot_mapping [T]
    int64 = page * page_size + offset, -1 = do not store. Returns [T, H, latent + rope] in q's type, of which the last
    ``rope`` values of a head are its rotated ones; the others are for the caller to fill.
    """
    latent = weight.shape[0]
    page_size, width = pages.shape[1:]
    rope = width - latent
    rows = cos_sin[positions]
    key = rotate(compressed[:, None, latent:], rows)[:, 0]
    stored = torch.cat((rms_norm(compressed[:, :latent], weight, eps), key), dim=1)
    keep = slot_mapping >= 0
    where = slot_mapping[keep]
    pages[where // page_size, where % page_size] = stored[keep].to(pages.dtype)
    wide = q.new_empty((q.shape[0], q.shape[1], width))
    wide[..., latent:] = rotate(q[..., q.shape[2] - rope :], rows)
    return wide


def latent_attention(
    q: Tensor,
    pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    kv_lens: Tensor,
    max_query: int,
    max_kv: int,
    scale: float,
    latent_dim: int,
) -> Tensor:
    """Causal attention of each row's new tokens over its cached latents (the new ones are stored already).

    q [T, H, latent + rope]; pages [num_pages, page_size, latent + rope]: of a token's values the first ``latent_dim``
    are the value too. Rows, tables and bounds are those of ``paged_attention``. Returns [T, H, latent_dim] in q's type.
    """
    out = q.new_zeros((*q.shape[:2], latent_dim))
    page_size = pages.shape[1]
    starts, lens = query_start.tolist(), kv_lens.tolist()
    for row, kv_len in enumerate(lens):
        begin, end = starts[row], starts[row + 1]
        if begin == end:
            continue
        keys = pages[page_table[row, : -(-kv_len // page_size)].long()].float().flatten(0, 1)[:kv_len]
        scores = torch.einsum("thd,kd->htk", q[begin:end].float(), keys) * scale
        query_at = torch.arange(kv_len - (end - begin), kv_len, device=q.device).unsqueeze(1)
        key_at = torch.arange(kv_len, device=q.device).unsqueeze(0)
        weights = torch.softmax(scores.masked_fill(key_at > query_at, float("-inf")), dim=-1)
        out[begin:end] = torch.einsum("htk,kd->thd", weights, keys[:, :latent_dim]).to(q.dtype)
    return out


def latent_prefill(
    out: Tensor,
    q: Tensor,
    wide: Tensor,
    up: Tensor,
    pages: Tensor,
    slots: Tensor,
    begins: Tensor,
    first_query: Tensor,
    first_key: Tensor,
    scale: float,
    work: Tensor,
) -> None:
    """The same attention in full heads, for rows of many queries: keys and values of every head are computed from latents.

    Fills the rows' tokens in out [T, H, value]. q [T, H, nope + rope], whose rotated parts are the last of wide [T, H,
    latent + rope]; up [H, nope + value, latent]. Row r of L has the queries begins[r] .. of which there are first_query[r
    + 1] - first_query[r] (both [L + 1] int32, from 0), and the keys at slots[first_key[r]:first_key[r + 1]] (page *
    page_size + offset, int64), the last query standing at the last key. ``work`` is memory of at least ``prefill_bytes``
    that kernels may use (this body does not).
    """
    latent = up.shape[2]
    rope = wide.shape[2] - latent
    nope = q.shape[2] - rope
    queries, keys = first_query.tolist(), first_key.tolist()
    for row, begin in enumerate(begins.tolist()):
        count = queries[row + 1] - queries[row]
        where = slots[keys[row] : keys[row + 1]]
        cached = pages[where // pages.shape[1], where % pages.shape[1]].float()
        key, value = torch.einsum("kl,hnl->hkn", cached[:, :latent], up.float()).tensor_split((nope,), dim=-1)
        plain, turned = q[begin : begin + count, :, :nope], wide[begin : begin + count, :, latent:]
        scores = torch.einsum("thn,hkn->htk", plain.float(), key)
        scores = (scores + torch.einsum("thr,kr->htk", turned.float(), cached[:, latent:])) * scale
        last = torch.arange(len(where) - count, len(where), device=q.device).unsqueeze(1)
        hidden = torch.arange(len(where), device=q.device) > last
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
        out[begin : begin + count] = torch.einsum("htk,hkv->thv", weights, value).to(out.dtype)


def prefill_bytes(num_keys: int, width: int, head_width: int, element_bytes: int) -> int:
    """Least workspace of ``latent_prefill``: latents of ``width`` values, and a few heads of ``head_width`` a key."""
    return num_keys * (width + 4 * head_width) * element_bytes + 256


LATENT_STORE = Op("latent_store", latent_store, triton_rows("latent:latent_store"))
LATENT_ATTENTION = Op(
    "latent_attention",
    latent_attention,
    triton_rows("latent:LatentAttention", "LatentAttentionHopper", factory=True),
)
LATENT_PREFILL = Op(
    "latent_prefill",
    latent_prefill,
    triton_rows("latent_prefill:latent_prefill", "latent_prefill_hopper"),
)
