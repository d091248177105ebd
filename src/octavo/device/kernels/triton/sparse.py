"""Sparse latent attention in Triton: the indexer's store, its scores of all keys, attention over the chosen latents.

Nothing here asks the host, so that a step can be captured as a graph: scores have the host's bound of keys, attention has
the number of keys that are chosen at most.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.device.kernels.triton.ranges import (
    LOG2E,
    LOWEST,
    leave_range,
    merge_ranges,
    range_size,
    scratch,
    weighed,
)

SPAN = 1024  # keys scored by one program
HEADS = 8  # rotated by one program of the store
MAX_SPLITS = 16
TARGET_PROGRAMS = 264


@triton.jit
def _rotated(row, angle, dims, D: tl.constexpr, ROPE: tl.constexpr):
    """The D values at ``row``, the first ROPE of them rotated by cos | sin at ``angle``."""
    half: tl.constexpr = ROPE // 2
    turned, first = dims < ROPE, dims < half
    at = tl.where(first, dims, dims - half)
    cos = tl.load(angle + at, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(angle + half + at, mask=turned, other=0.0).to(tl.float32)
    x = tl.load(row + dims, mask=dims < D, other=0.0).to(tl.float32)
    y = tl.load(row + tl.where(first, dims + half, dims - half), mask=turned, other=0.0).to(tl.float32)
    return x * cos + tl.where(first, -y, y) * sin


@triton.jit(do_not_specialize_on_alignment=("positions", "slot_mapping"))
def _index_store_kernel(
    out, q, key, cos_sin, positions, pages, slot_mapping,
    stride_token, stride_head, stride_key, stride_rope, stride_page, stride_slot,
    H: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (token, 0) stores a key; (token, i) rotates HEADS heads of the query."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dims = tl.arange(0, DPAD)
    angle = cos_sin + tl.load(positions + token) * stride_rope
    if part == 0:
        slot = tl.load(slot_mapping + token)
        if slot >= 0:
            place = pages + (slot // PAGE) * stride_page + (slot % PAGE) * stride_slot
            turned = _rotated(key + token * stride_key, angle, dims, D, ROPE).to(key.dtype.element_ty)
            tl.store(place + dims, turned.to(pages.dtype.element_ty), mask=dims < D)
    else:
        for index in tl.static_range(HEADS):
            head = (part - 1) * HEADS + index
            if head < H:
                turned = _rotated(q + token * stride_token + head * stride_head, angle, dims, D, ROPE)
                place = out + (token * H + head) * D + dims
                tl.store(place, turned.to(out.dtype.element_ty), mask=dims < D)


def index_store(
    q: Tensor, key: Tensor, cos_sin: Tensor, positions: Tensor, pages: Tensor, slot_mapping: Tensor
) -> Tensor:
    """``octavo.device.ops.sparse.index_store`` on a GPU; heads of q and rows of key are contiguous."""
    tokens, heads, size = q.shape
    out = torch.empty((tokens, heads, size), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    _index_store_kernel[(tokens, 1 + triton.cdiv(heads, HEADS))](
        out, q, key, cos_sin, positions, pages, slot_mapping, q.stride(0), q.stride(1), key.stride(0),
        cos_sin.stride(0), pages.stride(0), pages.stride(1), H=heads, D=size, DPAD=triton.next_power_of_2(size),
        ROPE=cos_sin.shape[1], PAGE=pages.shape[1], HEADS=HEADS, num_warps=2,
    )  # fmt: skip
    return out


@triton.jit(
    do_not_specialize=["max_kv", "first", "stride_table"],
    do_not_specialize_on_alignment=("page_table", "rows", "seen"),
)
def _scores_kernel(
    out, q, weights, pages, page_table, rows, seen, max_kv, first, stride_table, stride_page, stride_slot,
    H: tl.constexpr, HPAD: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr, SPAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of one token with SPAN keys."""
    local, span = tl.program_id(0), tl.program_id(1)
    token = first + local
    length = tl.load(seen + token)
    if span * SPAN >= length:
        return
    heads, dims = tl.arange(0, HPAD), tl.arange(0, DPAD)
    inside = (heads < H)[:, None] & (dims < D)[None, :]
    flat = token.to(tl.int64) * H + heads
    queries = tl.load(q + flat[:, None] * D + dims[None, :], mask=inside, other=0.0)
    w = tl.load(weights + flat, mask=heads < H, other=0.0)
    table = page_table + tl.load(rows + token).to(tl.int64) * stride_table
    target = out + local.to(tl.int64) * max_kv
    for start in range(span * SPAN, tl.minimum(span * SPAN + SPAN, length), BLOCK_N):
        key_at = start + tl.arange(0, BLOCK_N)
        there = key_at < length
        page = tl.load(table + key_at // PAGE, mask=there, other=0).to(tl.int64)
        at = pages + page * stride_page + (key_at % PAGE) * stride_slot
        keys = tl.load(at[:, None] + dims[None, :], mask=there[:, None] & (dims < D)[None, :], other=0.0)
        products = tl.dot(queries, tl.trans(keys.to(queries.dtype)), input_precision=PRECISION)
        tl.store(target + key_at, tl.sum(tl.maximum(products, 0.0) * w[:, None], 0), mask=there)


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
    """``octavo.device.ops.sparse.index_scores`` on a GPU; q and weights are contiguous."""
    heads, size = q.shape[1:]
    out = torch.empty((count, max_kv), dtype=torch.float32, device=q.device)
    if count == 0:
        return out
    wide = q.element_size() == 4
    _scores_kernel[(count, triton.cdiv(max_kv, SPAN))](
        out, q, weights, pages, page_table, rows, seen, max_kv, first,
        page_table.stride(0), pages.stride(0), pages.stride(1), H=heads, HPAD=max(16, triton.next_power_of_2(heads)),
        D=size, DPAD=max(16, triton.next_power_of_2(size)), PAGE=pages.shape[1], BLOCK_N=32 if wide else 64, SPAN=SPAN,
        PRECISION="ieee" if wide else "tf32", num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


@triton.jit
def _ordered(scores):
    """Whole numbers from 0 to 2^32 - 1 in the order of float32 scores."""
    bits = scores.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -bits - 1, bits + 2147483648)


@triton.jit(
    do_not_specialize=["max_kv", "first", "stride_table"],
    do_not_specialize_on_alignment=("page_table", "rows", "seen"),
)
def _choose_kernel(
    out, scores, page_table, rows, seen, max_kv, first, stride_table,
    K: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The K best keys of one token: their K-th score is found a byte at a time by counting, then they are listed."""
    local = tl.program_id(0)
    token = first + local
    length = tl.load(seen + token)
    table = page_table + tl.load(rows + token).to(tl.int64) * stride_table
    source = scores + local.to(tl.int64) * max_kv
    target = out + local.to(tl.int64) * K
    lanes = tl.arange(0, BLOCK)
    if length <= K:
        for start in range(0, K, BLOCK):
            at = start + lanes
            page = tl.load(table + at // PAGE, mask=at < length, other=0).to(tl.int64)
            tl.store(target + at, tl.where(at < length, page * PAGE + at % PAGE, -1), mask=at < K)
    else:
        bins = tl.arange(0, 512)  # 256 counts what an earlier byte ruled out
        edge = tl.full((), 0, tl.int64)
        wanted = tl.full((), K, tl.int32)
        for shift in tl.static_range(24, -8, -8):
            counts = tl.zeros((512,), tl.int32)
            for start in range(0, length, BLOCK):
                at = start + lanes
                key = _ordered(tl.load(source + at, mask=at < length, other=0.0))
                mine = (at < length) & ((key >> (shift + 8)) == (edge >> (shift + 8)))
                counts += tl.histogram(tl.where(mine, (key >> shift) & 255, 256).to(tl.int32), 512)
            counts = tl.where(bins < 256, counts, 0)
            from_here = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
            found = tl.sum(((from_here >= wanted) & (bins < 256)).to(tl.int32), 0) - 1
            wanted -= tl.sum(tl.where(bins > found, counts, 0), 0)
            edge += found.to(tl.int64) << shift
        listed = tl.full((), 0, tl.int32)
        ties = tl.full((), 0, tl.int32)
        for start in range(0, length, BLOCK):
            at = start + lanes
            key = _ordered(tl.load(source + at, mask=at < length, other=0.0))
            equal = ((at < length) & (key == edge)).to(tl.int32)
            early = (equal > 0) & (ties + tl.cumsum(equal, 0) <= wanted)
            taken = (((at < length) & (key > edge)) | early).to(tl.int32)
            page = tl.load(table + at // PAGE, mask=taken > 0, other=0).to(tl.int64)
            place = listed + tl.cumsum(taken, 0) - 1
            tl.store(target + place, page * PAGE + at % PAGE, mask=taken > 0)
            listed += tl.sum(taken, 0)
            ties += tl.sum(equal, 0)


def index_choose(
    scores: Tensor, page_table: Tensor, rows: Tensor, seen: Tensor, page_size: int, top_k: int, first: int
) -> Tensor:
    """``octavo.device.ops.sparse.index_choose`` on a GPU; scores are contiguous."""
    count, max_kv = scores.shape
    out = torch.empty((count, top_k), dtype=torch.int64, device=scores.device)
    if count:
        _choose_kernel[(count,)](
            out, scores, page_table, rows, seen, max_kv, first, page_table.stride(0),
            K=top_k, PAGE=page_size, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _sparse_kernel(
    out, sums, stats, q, pages, chosen, counts, scale, stride_page, stride_slot,
    H: tl.constexpr, K: tl.constexpr, LATENT: tl.constexpr, LPAD: tl.constexpr, ROPE: tl.constexpr, RPAD: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One range of a token's chosen keys for BLOCK_M heads; SPLITS as in the kernel over all keys."""
    split, token, block = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    count = tl.minimum(tl.load(counts + token), K).to(tl.int32)
    size = range_size(count, BLOCK_N, SPLITS)
    start = split * size
    if SPLITS > 1:  # noqa: SIM102  one is known at compile time, the other is not
        if start >= count:
            return
    head = block * BLOCK_M + tl.arange(0, BLOCK_M)
    real = head < H
    dims, turned = tl.arange(0, LPAD), tl.arange(0, RPAD)
    flat = token * H + head
    at = q + flat[:, None] * (LATENT + ROPE)
    queries = tl.load(at + dims[None, :], mask=real[:, None] & (dims < LATENT)[None, :], other=0.0)
    q_rope = tl.load(at + LATENT + turned[None, :], mask=real[:, None] & (turned < ROPE)[None, :], other=0.0)
    best = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, LPAD), tl.float32)
    for begin in range(start, tl.minimum(start + size, count), BLOCK_N):
        index = begin + tl.arange(0, BLOCK_N)
        slot = tl.load(chosen + token * K + index, mask=index < count, other=-1)
        there = slot >= 0
        slot = tl.where(there, slot, 0)
        row = pages + (slot // PAGE) * stride_page + (slot % PAGE) * stride_slot
        c = tl.load(row[:, None] + dims[None, :], mask=there[:, None] & (dims < LATENT)[None, :], other=0.0)
        inside = there[:, None] & (turned < ROPE)[None, :]
        r = tl.load(row[:, None] + LATENT + turned[None, :], mask=inside, other=0.0)
        c, r = c.to(queries.dtype), r.to(queries.dtype)
        scores = tl.dot(queries, tl.trans(c), input_precision=PRECISION)
        scores = tl.dot(q_rope, tl.trans(r), scores, input_precision=PRECISION) * (scale * LOG2E)
        scores = tl.where(there[None, :], scores, float("-inf"))
        weights, shrink, best, total = weighed(scores, best, total)
        acc = tl.dot(weights.to(queries.dtype), c, acc * shrink[:, None], input_precision=PRECISION)
    inside = real[:, None] & (dims < LATENT)[None, :]
    if SPLITS == 1:
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + flat[:, None] * LATENT + dims[None, :], acc.to(out.dtype.element_ty), mask=inside)
    else:
        leave_range(sums, stats, acc, best, total, flat, split, dims, real, inside, LATENT, SPLITS)


@triton.jit
def _merge_kernel(
    out, sums, stats, counts,
    H: tl.constexpr, K: tl.constexpr, LATENT: tl.constexpr, LPAD: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge the ranges of one (token, head) pair, each weighted by its own maximum."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = tl.minimum(tl.load(counts + token), K).to(tl.int32)
    ranges = tl.cdiv(count, tl.maximum(range_size(count, BLOCK_N, SPLITS), 1))
    flat, dims = token * H + head, tl.arange(0, LPAD)
    merged, denominator, _ = merge_ranges(sums, stats, flat, ranges, dims, LOWEST, LATENT, LPAD, SPLITS)
    merged = merged / tl.where(denominator > 0, denominator, 1.0)
    tl.store(out + flat * LATENT + dims, merged.to(out.dtype.element_ty), mask=dims < LATENT)


def num_splits(tokens: int, num_heads: int, block_m: int) -> int:
    """Ranges of chosen keys for each token: a power of two that fills the device."""
    wanted = max(1, TARGET_PROGRAMS // max(1, tokens * triton.cdiv(num_heads, block_m)))
    return 1 << (min(wanted, MAX_SPLITS).bit_length() - 1)


def sparse_attention(
    q: Tensor,
    pages: Tensor,
    chosen: Tensor,
    counts: Tensor,
    scale: float,
    latent_dim: int,
    *,
    large: bool = False,
) -> Tensor:
    """``octavo.device.ops.sparse.sparse_attention`` on a GPU; q, chosen and counts are contiguous.

    ``large``: the GPU has at least 160 KiB of shared memory a multiprocessor.
    """
    tokens, num_heads, width = q.shape
    out = torch.empty((tokens, num_heads, latent_dim), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    wide = q.element_size() == 4
    block_m = 64 if large and not wide and num_heads > 32 else 16
    splits = num_splits(tokens, num_heads, block_m)
    sums, stats = scratch(out, tokens * num_heads, splits, latent_dim)
    shape = {
        "H": num_heads, "K": chosen.shape[1], "LATENT": latent_dim,
        "LPAD": max(16, triton.next_power_of_2(latent_dim)), "BLOCK_N": 16 if wide else 32, "SPLITS": splits,
    }  # fmt: skip
    _sparse_kernel[(splits, tokens, triton.cdiv(num_heads, block_m))](
        out, sums, stats, q, pages, chosen, counts, scale, pages.stride(0), pages.stride(1), ROPE=width - latent_dim,
        RPAD=max(16, triton.next_power_of_2(width - latent_dim)), PAGE=pages.shape[1], BLOCK_M=block_m,
        PRECISION="ieee" if wide else "tf32", **shape, num_warps=8 if block_m > 16 else 4, num_stages=2 if large else 1,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(tokens, num_heads)](out, sums, stats, counts, **shape, num_warps=4)
    return out


sparse_attention_hopper = partial(sparse_attention, large=True)
