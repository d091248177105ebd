"""Latent attention in Triton: the store of latents with both rotations, and attention over pages of latents.

Every head sees the same keys, so the rows of a tile are (token, head) pairs of one sequence, in this order: a decode step
of 128 heads has two tiles a sequence, a model of 16 heads puts four tokens of a prompt into one. A page is read once for
a tile, as key and as value. Keys are cut into ranges that are merged afterwards where tiles alone do not fill the device.
Grids depend on host bounds alone, so that a step can be captured as a graph.
"""

from __future__ import annotations

from dataclasses import dataclass
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

METADATA = ("page_table", "query_start", "kv_lens")  # views of one packed upload: any alignment, one kernel
MAX_SPLITS = 64
TARGET_PROGRAMS = 264  # two on every multiprocessor of a large GPU: their tiles are wide
UNSPLIT_TOKENS = 1024  # larger steps fill a device without ranges
HEADS = 8  # rotated by one program of the store


@dataclass(frozen=True)
class Tiles:
    """Launch shape: (token, head) pairs, keys a turn, warps, software pipeline depth."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@triton.jit
def _turned(row, angle, dims, ROPE: tl.constexpr):
    """The ROPE values at ``row`` rotated by cos | sin at ``angle``; the last axis is ``dims``."""
    half: tl.constexpr = ROPE // 2
    inside = dims < ROPE
    first = dims < half
    partner = tl.where(first, dims + half, dims - half)
    at = tl.where(first, dims, dims - half)
    cos = tl.load(angle + at, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(angle + half + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(row + dims, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(row + partner, mask=inside, other=0.0).to(tl.float32)
    return x * cos + tl.where(first, -y, y) * sin


@triton.jit(do_not_specialize_on_alignment=("positions", "slot_mapping"))
def _store_kernel(
    wide, q, compressed, weight, cos_sin, positions, pages, slot_mapping, eps,
    stride_token, stride_head, stride_compressed, stride_rope, stride_page, stride_slot,
    H: tl.constexpr, QUERY: tl.constexpr, LATENT: tl.constexpr, LPAD: tl.constexpr, ROPE: tl.constexpr,
    RPAD: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (token, 0) norms and stores a latent and its key; (token, i) rotates HEADS heads of the query."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    turned = tl.arange(0, RPAD)
    angle = cos_sin + tl.load(positions + token) * stride_rope
    if part == 0:
        slot = tl.load(slot_mapping + token)
        if slot >= 0:
            dims = tl.arange(0, LPAD)
            row = compressed + token * stride_compressed
            x = tl.load(row + dims, mask=dims < LATENT, other=0.0).to(tl.float32)
            rms = tl.rsqrt(tl.sum(x * x, 0) / LATENT + eps)
            normed = x * rms * tl.load(weight + dims, mask=dims < LATENT, other=0.0).to(tl.float32)
            place = pages + (slot // PAGE) * stride_page + (slot % PAGE) * stride_slot
            kind = compressed.dtype.element_ty
            tl.store(place + dims, normed.to(kind).to(pages.dtype.element_ty), mask=dims < LATENT)
            key = _turned(row + LATENT, angle, turned, ROPE)
            tl.store(place + LATENT + turned, key.to(kind).to(pages.dtype.element_ty), mask=turned < ROPE)
    else:
        for index in tl.static_range(HEADS):
            head = (part - 1) * HEADS + index
            if head < H:
                row = q + token * stride_token + head * stride_head + (QUERY - ROPE)
                y = _turned(row, angle, turned, ROPE)
                place = wide + (token * H + head) * (LATENT + ROPE) + LATENT
                tl.store(place + turned, y.to(wide.dtype.element_ty), mask=turned < ROPE)


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
    """``octavo.device.ops.latent.latent_store`` on a GPU; heads of q and rows of ``compressed`` are contiguous."""
    tokens, num_heads, query = q.shape
    latent, page_size, width = weight.shape[0], *pages.shape[1:]
    wide = torch.empty((tokens, num_heads, width), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return wide
    rope = width - latent
    _store_kernel[(tokens, 1 + triton.cdiv(num_heads, HEADS))](
        wide, q, compressed, weight, cos_sin, positions, pages, slot_mapping, eps,
        q.stride(0), q.stride(1), compressed.stride(0), cos_sin.stride(0), pages.stride(0), pages.stride(1),
        H=num_heads, QUERY=query, LATENT=latent, LPAD=triton.next_power_of_2(latent), ROPE=rope,
        RPAD=triton.next_power_of_2(rope), PAGE=page_size, HEADS=HEADS, num_warps=2,
    )  # fmt: skip
    return wide


@triton.jit
def _attend(
    acc, total, best, q, q_rope, pages, table, begin, end, query_at, kv_len, stride_page, stride_slot, unit,
    LATENT: tl.constexpr, LPAD: tl.constexpr, ROPE: tl.constexpr, RPAD: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold keys [begin, end) into (acc, total, best); without MASKED all exist and are visible to all rows."""
    dims, turned = tl.arange(0, LPAD), tl.arange(0, RPAD)
    for start in range(begin, end, BLOCK_N):
        key_at = start + tl.arange(0, BLOCK_N)
        there = key_at < kv_len
        page = tl.load(table + key_at // PAGE, mask=there, other=0).to(tl.int64)
        row = pages + page * stride_page + (key_at % PAGE) * stride_slot
        if LATENT == LPAD and not MASKED:
            c = tl.load(row[:, None] + dims[None, :])
        else:
            c = tl.load(
                row[:, None] + dims[None, :], mask=there[:, None] & (dims < LATENT)[None, :], other=0.0
            )
        if ROPE == RPAD and not MASKED:
            r = tl.load(row[:, None] + LATENT + turned[None, :])
        else:
            inside = there[:, None] & (turned < ROPE)[None, :]
            r = tl.load(row[:, None] + LATENT + turned[None, :], mask=inside, other=0.0)
        c, r = c.to(q.dtype), r.to(q.dtype)
        scores = tl.dot(q, tl.trans(c), input_precision=PRECISION)
        scores = tl.dot(q_rope, tl.trans(r), scores, input_precision=PRECISION) * unit
        if MASKED:
            visible = (key_at[None, :] <= query_at[:, None]) & there[None, :]
            scores = tl.where(visible, scores, float("-inf"))
        weights, shrink, best, total = weighed(scores, best, total)
        acc = tl.dot(weights.to(q.dtype), c, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, best


@triton.jit
def _row_of(query_start, pid, num_rows, H: tl.constexpr, BLOCK_M: tl.constexpr):
    """The row of tile ``pid``: row r owns the tiles from query_start[r] * H // BLOCK_M + r on, as many as it may need."""
    low: tl.int32 = 0
    high = num_rows
    while high - low > 1:  # the last row whose first tile is not after ours
        middle = (low + high) // 2
        first_tile = tl.load(query_start + middle) * H // BLOCK_M + middle
        low = tl.where(first_tile <= pid, middle, low)
        high = tl.where(first_tile <= pid, high, middle)
    return low


@triton.jit(do_not_specialize=["num_rows", "stride_table"], do_not_specialize_on_alignment=METADATA)
def _attention_kernel(
    out, sums, stats, q, pages, page_table, query_start, kv_lens, num_rows, scale,
    stride_table, stride_page, stride_slot,
    H: tl.constexpr, LATENT: tl.constexpr, LPAD: tl.constexpr, ROPE: tl.constexpr, RPAD: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One range of keys for one tile of BLOCK_M (token, head) pairs of one row.

    SPLITS == 1 writes the output; otherwise unnormalized sums go to sums [T * H, SPLITS, LATENT], and (maximum, total) to
    stats [T * H, SPLITS, 2], for ``_merge_kernel``.
    """
    split, pid = tl.program_id(0), tl.program_id(1)
    row = _row_of(query_start, pid, num_rows, H, BLOCK_M)
    begin = tl.load(query_start + row)
    count = tl.load(query_start + row + 1) - begin
    tile = (
        tl.cdiv(count * H, BLOCK_M) - 1 - (pid - (begin * H // BLOCK_M + row))
    )  # longest ranges of keys start first
    if tile < 0:
        return
    kv_len = tl.load(kv_lens + row)
    pair = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = pair < count * H
    query_at = kv_len - count + pair // H
    first = kv_len - count + tile * BLOCK_M // H  # position of the tile's first query
    end = tl.minimum(kv_len, kv_len - count + (tile * BLOCK_M + BLOCK_M - 1) // H + 1)
    size = range_size(end, BLOCK_N, SPLITS)
    start = split * size
    if start >= end:
        return
    stop = tl.minimum(start + size, end)
    dims, turned = tl.arange(0, LPAD), tl.arange(0, RPAD)
    flat = begin.to(tl.int64) * H + pair
    at = q + flat[:, None] * (LATENT + ROPE)
    queries = tl.load(at + dims[None, :], mask=real[:, None] & (dims < LATENT)[None, :], other=0.0)
    q_rope = tl.load(at + LATENT + turned[None, :], mask=real[:, None] & (turned < ROPE)[None, :], other=0.0)
    best = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, LPAD), tl.float32)
    table = page_table + row.to(tl.int64) * stride_table
    plain = tl.minimum(stop, (first + 1) // BLOCK_N * BLOCK_N)  # keys before it are visible to the whole tile
    plain = tl.maximum(start, plain)
    acc, total, best = _attend(
        acc, total, best, queries, q_rope, pages, table, start, plain, query_at, kv_len, stride_page, stride_slot,
        scale * LOG2E, LATENT, LPAD, ROPE, RPAD, PAGE, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    acc, total, best = _attend(
        acc, total, best, queries, q_rope, pages, table, plain, stop, query_at, kv_len, stride_page, stride_slot,
        scale * LOG2E, LATENT, LPAD, ROPE, RPAD, PAGE, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    inside = real[:, None] & (dims < LATENT)[None, :]
    if SPLITS == 1:
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + flat[:, None] * LATENT + dims[None, :], acc.to(out.dtype.element_ty), mask=inside)
    else:
        leave_range(sums, stats, acc, best, total, flat, split, dims, real, inside, LATENT, SPLITS)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=METADATA[1:])
def _merge_kernel(
    out, sums, stats, query_start, kv_lens, num_rows,
    H: tl.constexpr, LATENT: tl.constexpr, LPAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge the ranges of one (token, head) pair, each weighted by its own maximum."""
    token, head = tl.program_id(0), tl.program_id(1)
    low: tl.int32 = 0
    high = num_rows
    while high - low > 1:  # the last row that begins at or before the token, empty ones before it left out
        middle = (low + high) // 2
        here = tl.load(query_start + middle) <= token
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle)
    row = low
    begin = tl.load(query_start + row)
    count = tl.load(query_start + row + 1) - begin
    if token >= begin + count:
        return
    kv_len = tl.load(kv_lens + row)
    tile = ((token - begin) * H + head) // BLOCK_M
    end = tl.minimum(kv_len, kv_len - count + (tile * BLOCK_M + BLOCK_M - 1) // H + 1)
    ranges = tl.cdiv(end, range_size(end, BLOCK_N, SPLITS))
    flat, dims = token.to(tl.int64) * H + head, tl.arange(0, LPAD)
    merged, denominator, _ = merge_ranges(sums, stats, flat, ranges, dims, LOWEST, LATENT, LPAD, SPLITS)
    merged = merged / tl.where(denominator > 0, denominator, 1.0)
    tl.store(out + flat * LATENT + dims, merged.to(out.dtype.element_ty), mask=dims < LATENT)


def attention_tiles(num_heads: int, max_query: int, wide: bool, large: bool) -> Tiles:
    """``wide`` = 4-byte elements, ``large`` = the shared memory of data-centre GPUs. A tile of 64 pairs of 512 values fills
    half the registers of a multiprocessor."""
    if wide:
        return Tiles(16, 16, 4, 1)
    if not large:
        return Tiles(16, 32, 4, 1)
    if max_query == 1 and num_heads <= 32:
        return Tiles(max(16, triton.next_power_of_2(num_heads)), 32, 4, 3)
    return Tiles(64, 32, 8, 2)


def num_splits(tokens: int, num_heads: int, block_m: int) -> int:
    """Ranges of keys for each tile: a power of two that fills the device; it does not follow the lengths of a step."""
    if tokens > UNSPLIT_TOKENS:
        return 1
    wanted = max(1, TARGET_PROGRAMS // max(1, tokens * num_heads // block_m))
    return 1 << (min(wanted, MAX_SPLITS).bit_length() - 1)


class LatentAttention:
    """``octavo.device.ops.latent.latent_attention`` on a GPU; q is contiguous.

    ``large``: the GPU has at least 160 KiB of shared memory a multiprocessor.
    """

    def __init__(self, large: bool = False) -> None:
        self.large = large

    def __call__(
        self,
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
        """Same arguments and result as the op."""
        tokens, num_heads, width = q.shape
        rows = kv_lens.shape[0]
        out = torch.empty((tokens, num_heads, latent_dim), dtype=q.dtype, device=q.device)
        if tokens == 0 or rows == 0:
            return out
        tiles = attention_tiles(num_heads, max_query, q.element_size() == 4, self.large)
        splits = num_splits(tokens, num_heads, tiles.block_m)
        sums, stats = scratch(out, tokens * num_heads, splits, latent_dim)
        shape = {
            "H": num_heads, "LATENT": latent_dim, "LPAD": max(16, triton.next_power_of_2(latent_dim)),
            "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "SPLITS": splits,
        }  # fmt: skip
        _attention_kernel[(splits, tokens * num_heads // tiles.block_m + rows)](
            out, sums, stats, q, pages, page_table, query_start, kv_lens, rows, scale,
            page_table.stride(0), pages.stride(0), pages.stride(1), ROPE=width - latent_dim,
            RPAD=max(16, triton.next_power_of_2(width - latent_dim)), PAGE=pages.shape[1],
            PRECISION="ieee" if q.element_size() == 4 else "tf32", **shape,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
        if splits > 1:
            _merge_kernel[(tokens, num_heads)](
                out, sums, stats, query_start, kv_lens, rows, **shape, num_warps=4
            )
        return out


LatentAttentionHopper = partial(LatentAttention, large=True)
