"""Attention over a window of tokens and over compressed entries in Triton: all heads of a token share every vector read.

A token's vectors are one list, the window's before the entries, cut into SPLITS ranges that are merged at the end:

    window   begin .. length - 1, through page_table        entries   0 .. length // rate - 1, through entry_table,
                                                                      or the slots that were chosen
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
    num_ranges,
    range_size,
    scratch,
    weighed,
)

RANGES = ((32, 16), (128, 4))


@triton.jit
def _attended(
    queries, at, there, dims, scale, best, total, acc, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One more block of vectors, keys and values at once, in an online softmax (base 2)."""
    vectors = tl.load(at[:, None] + dims[None, :], mask=there[:, None] & (dims < D)[None, :], other=0.0)
    vectors = vectors.to(queries.dtype)
    scores = tl.dot(queries, tl.trans(vectors), input_precision=PRECISION) * scale
    scores = tl.where(there[None, :], scores, float("-inf"))
    weights, shrink, best, total = weighed(scores, best, total)
    acc = tl.dot(weights.to(queries.dtype), vectors, acc * shrink[:, None], input_precision=PRECISION)
    return best, total, acc


@triton.jit
def _counts(length, WINDOW: tl.constexpr, RATE: tl.constexpr, K: tl.constexpr, ENTRIES: tl.constexpr):
    """How many tokens of the window and how many entries there are to look at."""
    near = tl.minimum(length, WINDOW)
    far = tl.full((), 0, tl.int32)
    if ENTRIES:
        far = length // RATE
        if K > 0:
            far = tl.minimum(far, K)
    return near, far


@triton.jit(
    do_not_specialize=["stride_table", "stride_home"],
    do_not_specialize_on_alignment=("page_table", "rows", "seen", "entry_table"),
)
def _attention_kernel(
    out, sums, stats, q, pages, page_table, entries, entry_table, chosen, rows, seen, scale, sinks,
    stride_page, stride_slot, stride_table, stride_entries, stride_entry, stride_home,
    H: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, WINDOW: tl.constexpr, RATE: tl.constexpr, K: tl.constexpr,
    ENTRIES: tl.constexpr, PAGE: tl.constexpr, PER_PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One range of a token's vectors for BLOCK_M heads; K = 0: all entries are seen."""
    split, token, block = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    length = tl.load(seen + token)
    near, far = _counts(length, WINDOW, RATE, K, ENTRIES)
    size = range_size(near + far, BLOCK_N, SPLITS)
    start = split * size
    end = tl.minimum(start + size, near + far)
    if SPLITS > 1:  # noqa: SIM102  one is known at compile time, the other is not
        if start >= near + far:
            return
    row = tl.load(rows + token).to(tl.int64)
    head = block * BLOCK_M + tl.arange(0, BLOCK_M)
    real = head < H
    dims, lanes = tl.arange(0, DPAD), tl.arange(0, BLOCK_N)
    flat = token * H + head
    inside = real[:, None] & (dims < D)[None, :]
    queries = tl.load(q + flat[:, None] * D + dims[None, :], mask=inside, other=0.0)
    best = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DPAD), tl.float32)
    unit = scale * LOG2E
    for begin in range(start, tl.minimum(end, near), BLOCK_N):
        index = begin + lanes
        there = index < tl.minimum(end, near)
        position = length - near + index
        page = tl.load(page_table + row * stride_table + position // PAGE, mask=there, other=0).to(tl.int64)
        at = pages + page * stride_page + (position % PAGE) * stride_slot
        best, total, acc = _attended(queries, at, there, dims, unit, best, total, acc, D, PRECISION)
    if ENTRIES:
        for begin in range(tl.maximum(start - near, 0), end - near, BLOCK_N):
            index = begin + lanes
            there = index < end - near
            if K > 0:
                slot = tl.load(chosen + token * K + index, mask=there, other=-1)
                there = there & (slot >= 0)
                slot = tl.where(there, slot, 0)
                at = entries + (slot // PER_PAGE) * stride_entries + (slot % PER_PAGE) * stride_entry
            else:
                home = tl.load(entry_table + row * stride_home + index // PER_PAGE, mask=there, other=0)
                at = entries + home.to(tl.int64) * stride_entries + (index % PER_PAGE) * stride_entry
            best, total, acc = _attended(queries, at, there, dims, unit, best, total, acc, D, PRECISION)
    if SPLITS == 1:
        sink = tl.load(sinks + head, mask=real, other=0.0) * LOG2E
        total += tl.exp2(tl.minimum(sink - best, 120.0))  # beyond that nothing is left for any vector
        acc = acc / total[:, None]
        acc = tl.where(length > 0, acc, 0.0)
        tl.store(out + flat[:, None] * D + dims[None, :], acc.to(out.dtype.element_ty), mask=inside)
    else:
        leave_range(sums, stats, acc, best, total, flat, split, dims, real, inside, D, SPLITS)


@triton.jit
def _merge_kernel(
    out, sums, stats, seen, sinks,
    H: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, WINDOW: tl.constexpr, RATE: tl.constexpr, K: tl.constexpr,
    ENTRIES: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge the ranges of one (token, head) pair, each weighted by its own maximum, and the head's sink."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    near, far = _counts(tl.load(seen + token), WINDOW, RATE, K, ENTRIES)
    ranges = tl.cdiv(near + far, tl.maximum(range_size(near + far, BLOCK_N, SPLITS), 1))
    flat, dims = token * H + head, tl.arange(0, DPAD)
    sink = tl.load(sinks + head) * LOG2E
    merged, total, highest = merge_ranges(sums, stats, flat, ranges, dims, sink, D, DPAD, SPLITS)
    merged = merged / (total + tl.exp2(sink - highest))
    tl.store(out + flat * D + dims, merged.to(out.dtype.element_ty), mask=dims < D)


def compressed_attention(
    q: Tensor,
    pages: Tensor,
    page_table: Tensor,
    window: int,
    entries: Tensor | None,
    entry_table: Tensor | None,
    rate: int,
    chosen: Tensor | None,
    rows: Tensor,
    seen: Tensor,
    max_kv: int,
    scale: float,
    sinks: Tensor,
    *,
    large: bool = False,
) -> Tensor:
    """``octavo.device.ops.compressed.compressed_attention`` on a GPU; q and chosen are contiguous.

    ``large``: the GPU has at least 160 KiB of shared memory a multiprocessor.
    """
    tokens, num_heads, size = q.shape
    out = torch.empty((tokens, num_heads, size), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    wide = q.element_size() == 4
    block_m = 64 if large and not wide and num_heads > 32 else 16
    splits = num_ranges(tokens, RANGES)
    sums, stats = scratch(out, tokens * num_heads, splits, size)
    far, home = (pages, page_table) if entries is None or entry_table is None else (entries, entry_table)
    shape = {
        "H": num_heads, "D": size, "DPAD": max(16, triton.next_power_of_2(size)), "WINDOW": window, "RATE": rate,
        "K": 0 if chosen is None else chosen.shape[1], "ENTRIES": entries is not None,
        "BLOCK_N": 16 if wide else 32, "SPLITS": splits,
    }  # fmt: skip
    _attention_kernel[(splits, tokens, triton.cdiv(num_heads, block_m))](
        out, sums, stats, q, pages, page_table, far, home, seen if chosen is None else chosen, rows, seen, scale, sinks,
        pages.stride(0), pages.stride(1), page_table.stride(0), far.stride(0), far.stride(1), home.stride(0),
        PAGE=pages.shape[1], PER_PAGE=far.shape[1], BLOCK_M=block_m, PRECISION="ieee" if wide else "tf32", **shape,
        num_warps=8 if block_m > 16 else 4, num_stages=2 if large else 1,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(tokens, num_heads)](out, sums, stats, seen, sinks, **shape, num_warps=4)
    return out


compressed_attention_hopper = partial(compressed_attention, large=True)
