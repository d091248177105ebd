"""Paged attention in Triton: one kernel for rows of any length, one for steps of single-token rows.

Both read keys and values through the page table and keep the softmax online (Dao et al. 2022); the query heads
that share a key head sit side by side in the rows of one tile, so that each key is read once for all of them.
Long rows of a decode step are cut into ranges of keys that are merged afterwards (flash decoding, Dao et al. 2023).
Grids depend on host bounds alone, everything else is read on the device, so that a step can be captured as a graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.device.kernels.rows import FEW

Tables = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None
]  # q, pages, table, starts, lengths, sinks, scales
Numbers = tuple[float, ...]  # scale, window, softcap, strides
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)  # stands for -inf as a running maximum: differences of it stay numbers

METADATA = ("page_table", "query_start", "kv_lens")  # views of one packed upload: any alignment, one kernel
MAX_SPLITS = 64
MERGE_SPLITS = 8  # more ranges are merged by a kernel of their own
TARGET_PROGRAMS = 512  # a few programs on every multiprocessor of a large GPU


@dataclass(frozen=True)
class Tiles:
    """Launch shape of one kernel: rows of queries, keys a turn, warps, software pipeline depth."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@triton.jit
def _softcap(scores, softcap):
    """softcap * tanh(scores / softcap) for scores in log2 units."""
    ratio = scores / (softcap * LOG2E)
    return (softcap * LOG2E) * (1.0 - 2.0 / (1.0 + tl.exp2(ratio * (2.0 * LOG2E))))


@triton.jit
def _attend(
    acc, total, best, q, base, table, begin, end, query_at, first_key, kv_len,
    stride_page, stride_value, stride_slot, scale, window, softcap,
    PAGE: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold keys [begin, end) of one key head into (acc, total, best); ``begin`` is a multiple of BLOCK_N.

    Without MASKED every key is visible to every query of the tile and exists. WINDOW: 0 none, 1 sliding, 2 chunks of
    ``window`` keys.
    """
    dims = tl.arange(0, DPAD)
    offsets = tl.arange(0, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        key_at = start + offsets
        if MASKED:
            there = (key_at >= first_key) & (key_at < kv_len)
            page = tl.load(table + key_at // PAGE, mask=there, other=0).to(tl.int64)
        else:
            page = tl.load(table + key_at // PAGE).to(tl.int64)
        at = base + (page * stride_page + (key_at % PAGE) * stride_slot)[:, None] + dims[None, :]
        if MASKED:
            inside = there[:, None] & (dims < D)[None, :]
            k = tl.load(at, mask=inside, other=0.0)
            v = tl.load(at + stride_value, mask=inside, other=0.0)
        elif D == DPAD:
            k = tl.load(at)
            v = tl.load(at + stride_value)
        else:
            k = tl.load(at, mask=(dims < D)[None, :], other=0.0)
            v = tl.load(at + stride_value, mask=(dims < D)[None, :], other=0.0)
        k = k.to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        unit = (
            scale * LOG2E
        )  # scores times unit are in log2 units; scale is positive, so maxima can wait for it
        if SOFTCAP:
            scores = _softcap(scores * unit, softcap)
            unit = 1.0
        if MASKED:
            visible = (key_at[None, :] <= query_at[:, None]) & there[None, :]
            if WINDOW == 1:
                visible = visible & (key_at[None, :] > query_at[:, None] - window)
            if WINDOW == 2:
                visible = visible & (key_at[None, :] >= (query_at // window * window)[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1) * unit)
        weights = tl.exp2(scores * unit - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc, input_precision=PRECISION)
        best = new_best
    return acc, total, best


@triton.jit(
    do_not_specialize=["singles", "num_rows", "window", "stride_table"],
    do_not_specialize_on_alignment=METADATA,
)
def _varlen_kernel(
    out, q, kv_pages, page_table, query_start, kv_lens, sinks, kv_scales, singles, num_rows, scale, window, softcap,
    stride_q, stride_table, stride_page, stride_value, stride_head, stride_slot,
    GROUP: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M // GROUP tokens of one row for one key head.

    Row r owns the tiles from query_start[r] // TOKENS + r on: at least as many as it needs, and the total has the
    host-side bound T // TOKENS + num_rows. With singles == 0, single-token rows are left to ``_decode_kernel``. SCALED:
    the key head's keys and values are stored divided by kv_scales [2, Hkv].
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    kv_head, pid = tl.program_id(0), tl.program_id(1)  # all heads of the longest tiles start first
    low: tl.int32 = 0
    high = num_rows
    while high - low > 1:  # the last row whose first tile is not after ours
        middle = (low + high) // 2
        first_tile = tl.load(query_start + middle) // TOKENS + middle
        low = tl.where(first_tile <= pid, middle, low)
        high = tl.where(first_tile <= pid, high, middle)
    row = low
    begin = tl.load(query_start + row)
    count = tl.load(query_start + row + 1) - begin
    tile = tl.cdiv(count, TOKENS) - 1 - (pid - (begin // TOKENS + row))  # longest ranges of keys start first
    if (tile < 0) | ((singles == 0) & (count == 1)):
        return
    kv_len = tl.load(kv_lens + row)
    lanes = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, DPAD)
    token = tile * TOKENS + lanes // GROUP
    head = kv_head * GROUP + lanes % GROUP
    real = (lanes < TOKENS * GROUP) & (token < count)
    at = (begin + token).to(tl.int64)[:, None] * stride_q + head[:, None] * D + dims[None, :]
    inside = real[:, None] & (dims < D)[None, :]
    queries = tl.load(q + at, mask=inside, other=0.0)
    first = kv_len - count + tile * TOKENS  # position of the first query
    query_at = kv_len - count + token
    end = tl.minimum(kv_len, first + TOKENS)
    if SCALED:
        scale *= tl.load(kv_scales + kv_head)
    if SINKS:
        best = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2E
        total = tl.full((BLOCK_M,), 1.0, tl.float32)
    else:
        best = tl.full((BLOCK_M,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DPAD), tl.float32)
    base = kv_pages + kv_head * stride_head
    table = page_table + row.to(tl.int64) * stride_table
    if WINDOW:
        first_key = tl.maximum(0, first - window + 1) if WINDOW == 1 else first // window * window
        plain = first_key // BLOCK_N * BLOCK_N
    else:
        first_key = 0
        plain = (first + 1) // BLOCK_N * BLOCK_N  # keys before it are visible to all queries of the tile
        acc, total, best = _attend(
            acc, total, best, queries, base, table, 0, plain, query_at, first_key, kv_len,
            stride_page, stride_value, stride_slot, scale, window, softcap,
            PAGE, D, DPAD, BLOCK_N, False, WINDOW, SOFTCAP, PRECISION,
        )  # fmt: skip
    acc, total, best = _attend(
        acc, total, best, queries, base, table, plain, end, query_at, first_key, kv_len,
        stride_page, stride_value, stride_slot, scale, window, softcap,
        PAGE, D, DPAD, BLOCK_N, True, WINDOW, SOFTCAP, PRECISION,
    )  # fmt: skip
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    if SCALED:
        acc *= tl.load(kv_scales + tl.num_programs(0) + kv_head)
    heads: tl.constexpr = D
    place = (begin + token).to(tl.int64)[:, None] * (tl.num_programs(0) * GROUP * heads) + head[:, None] * D
    tl.store(out + place + dims[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _key_range(kv_len, window, splits, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """(first key, start of the first range, keys a range) of a single-token row; ranges are whole blocks."""
    first_key = 0
    if WINDOW == 1:
        first_key = tl.maximum(0, kv_len - window)
    if WINDOW == 2:
        first_key = (kv_len - 1) // window * window
    origin = first_key // BLOCK_N * BLOCK_N
    return first_key, origin, tl.cdiv(tl.cdiv(kv_len - origin, BLOCK_N), splits) * BLOCK_N


@triton.jit
def _merge(out, sums, stats, ranges, D: tl.constexpr, DPAD: tl.constexpr, SPLITS: tl.constexpr):
    """Merge the ranges of one head, each weighted by its own maximum; read past the first-level cache."""
    dims = tl.arange(0, DPAD)
    splits = tl.arange(0, SPLITS)
    used = splits < ranges
    best = tl.load(stats + splits * 2, mask=used, other=LOWEST, cache_modifier=".cg")
    total = tl.load(stats + splits * 2 + 1, mask=used, other=0.0, cache_modifier=".cg")
    weight = tl.exp2(best - tl.max(best, 0))
    inside = used[:, None] & (dims < D)[None, :]
    at = splits[:, None] * D + dims[None, :]
    parts = tl.load(sums + at, mask=inside, other=0.0, cache_modifier=".cg")
    denominator = tl.sum(total * weight, 0)
    merged = tl.sum(parts * weight[:, None], 0) / tl.where(denominator > 0, denominator, 1.0)
    tl.store(out + dims, merged.to(out.dtype.element_ty), mask=dims < D)


@triton.jit(do_not_specialize=["singles", "window", "stride_table"], do_not_specialize_on_alignment=METADATA)
def _decode_kernel(
    out, sums, stats, counters, q, kv_pages, page_table, query_start, kv_lens, sinks, kv_scales, singles, scale, window, softcap,
    stride_q, stride_table, stride_page, stride_value, stride_head, stride_slot,
    GROUP: tl.constexpr, GPAD: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, MERGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One range of keys of one single-token row for the GROUP heads of one key head.

    SPLITS == 1 writes the output; otherwise unnormalized sums go to sums [R, Hq, SPLITS, D] and (maximum, total)
    to stats [R, Hq, SPLITS, 2]. With MERGE, whichever range of a row finishes last merges them all: it learns that
    from counters [R, Hkv], which are zero between launches; without it, ``_merge_kernel`` follows. With singles,
    rows of other lengths are left alone.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    kv_head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(query_start + row)
    count = tl.load(query_start + row + 1) - begin
    if (count == 0) | ((singles != 0) & (count != 1)):
        return
    kv_len = tl.load(kv_lens + row)
    first_key, origin, size = _key_range(kv_len, window, SPLITS, BLOCK_N, WINDOW)
    start = origin + split * size
    if start >= kv_len:
        return
    end = tl.minimum(start + size, kv_len)
    if SCALED:
        scale *= tl.load(kv_scales + kv_head)
    lanes = tl.arange(0, GPAD)
    dims = tl.arange(0, DPAD)
    head = kv_head * GROUP + lanes
    real = lanes < GROUP
    inside = real[:, None] & (dims < D)[None, :]
    queries = tl.load(
        q + begin.to(tl.int64) * stride_q + head[:, None] * D + dims[None, :], mask=inside, other=0.0
    )
    best = tl.full((GPAD,), LOWEST, tl.float32)
    total = tl.zeros((GPAD,), tl.float32)
    if SINKS:  # noqa: SIM102  one is known at compile time, the other is not
        if split == 0:
            best = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2E
            total = tl.full((GPAD,), 1.0, tl.float32)
    acc = tl.zeros((GPAD, DPAD), tl.float32)
    query_at = tl.full((GPAD,), 0, tl.int32) + (kv_len - 1)
    base = kv_pages + kv_head * stride_head
    table = page_table + row.to(tl.int64) * stride_table
    acc, total, best = _attend(
        acc, total, best, queries, base, table, start, end, query_at, first_key, kv_len,
        stride_page, stride_value, stride_slot, scale, window, softcap,
        PAGE, D, DPAD, BLOCK_N, True, WINDOW, SOFTCAP, PRECISION,
    )  # fmt: skip
    num_heads = tl.num_programs(0) * GROUP
    if SCALED:
        acc *= tl.load(kv_scales + tl.num_programs(0) + kv_head)
    if SPLITS == 1:
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        place = begin.to(tl.int64) * (num_heads * D) + head[:, None] * D + dims[None, :]
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)
    else:
        at = (row * num_heads + head).to(tl.int64) * SPLITS + split
        tl.store(sums + at[:, None] * D + dims[None, :], acc, mask=inside)
        tl.store(stats + at * 2, best, mask=real)
        tl.store(stats + at * 2 + 1, total, mask=real)
        if MERGE:
            tl.debug_barrier()  # all threads have stored before one of them announces it
            counter = counters + row * tl.num_programs(0) + kv_head
            ranges = tl.cdiv(kv_len - origin, size)
            if tl.atomic_add(counter, 1, sem="acq_rel") == ranges - 1:
                tl.store(counter, 0)
                for lane in tl.static_range(GROUP):
                    which = kv_head * GROUP + lane
                    first = (row * num_heads + which).to(tl.int64) * SPLITS
                    target = out + begin.to(tl.int64) * (num_heads * D) + which * D
                    _merge(target, sums + first * D, stats + first * 2, ranges, D, DPAD, SPLITS)


@triton.jit(do_not_specialize=["singles", "window"], do_not_specialize_on_alignment=METADATA[1:])
def _merge_kernel(
    out, sums, stats, query_start, kv_lens, singles, window,
    D: tl.constexpr, DPAD: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Merge the ranges of one head of one single-token row; faster than MERGE where the ranges are many."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head, row = tl.program_id(0), tl.program_id(1)
    begin = tl.load(query_start + row)
    count = tl.load(query_start + row + 1) - begin
    if (count == 0) | ((singles != 0) & (count != 1)):
        return
    _, origin, size = _key_range(tl.load(kv_lens + row), window, SPLITS, BLOCK_N, WINDOW)
    ranges = tl.cdiv(tl.load(kv_lens + row) - origin, size)
    first = (row * tl.num_programs(0) + head).to(tl.int64) * SPLITS
    target = out + (begin.to(tl.int64) * tl.num_programs(0) + head) * D
    _merge(target, sums + first * D, stats + first * 2, ranges, D, DPAD, SPLITS)


def num_splits(rows: int, num_kv_heads: int, window: int, block_n: int) -> int:
    """Ranges of keys for each single-token row: a power of two that fills the device.

    It does not follow the lengths of a step, so that few kernels exist and a step of any length finds one compiled;
    ranges past the end of a row return at once.
    """
    wanted = max(1, TARGET_PROGRAMS // max(1, rows * num_kv_heads))
    useful = -(-window // block_n) + 1 if window else MAX_SPLITS
    return 1 << (min(wanted, useful, MAX_SPLITS).bit_length() - 1)


def varlen_tiles(head_dim: int, wide: bool, group: int, large: bool, max_query: int) -> Tiles:
    """Tiles for rows of any length; ``wide`` = 4-byte elements, ``large`` = the shared memory of data-centre GPUs."""
    least = max(16, triton.next_power_of_2(group))
    if wide:
        return Tiles(max(32, least), 32, 4, 1)
    if head_dim > 128:
        return Tiles(max(64, least), 64 if large else 32, 8 if large else 4, 2)
    if large and max_query >= 1024 and group >= 4:  # fewer heads share a key: smaller tiles are faster
        return Tiles(max(256, least), 64, 8, 3)
    return Tiles(max(64, least), 64, 4, 3 if large else 2)


def decode_tiles(head_dim: int, wide: bool, large: bool) -> Tiles:
    """Tiles for single-token rows (the rows of the tile are the heads of one key head)."""
    if wide:
        return Tiles(16, 32, 4, 2)
    if head_dim > 128:
        return Tiles(16, 32, 4, 2)
    return Tiles(16, 64, 2, 4 if large else 2)


class PagedAttention:
    """``octavo.device.ops.attention.paged_attention`` on a GPU; the heads and dims of q are contiguous.

    ``large``: the GPU has at least 160 KiB of shared memory a multiprocessor; ``pdl``: programmatic dependent launch
    for a step of one token, whose other kernels take part in it too. An instance keeps the zeroed counters of its
    splits, so calls of one instance must follow each other in one stream. ``tiles`` and ``apart`` replace what would be
    chosen for rows of any length (``octavo.bench.gpu_attention`` compares them).
    """

    def __init__(
        self, large: bool = False, pdl: bool = False, tiles: Tiles | None = None, apart: bool | None = None
    ) -> None:
        self.large = large
        self.pdl = pdl
        self.tiles = tiles
        self.apart = apart
        self.counters: Tensor | None = None

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
        kv_scales: Tensor | None = None,
    ) -> Tensor:
        """Same arguments and result as the op."""
        tokens, num_heads, head_dim = q.shape
        num_kv_heads, page_size = kv_pages.shape[2], kv_pages.shape[3]
        out = torch.empty((tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
        if tokens == 0 or kv_lens.shape[0] == 0:
            return out
        tables = (q, kv_pages, page_table, query_start, kv_lens, sinks, kv_scales)
        window = window or chunk
        numbers = (scale, window, softcap, q.stride(0), page_table.stride(0), *kv_pages.stride()[:4])
        pdl = self.pdl and tokens <= FEW
        static = {
            "GROUP": num_heads // num_kv_heads, "PAGE": page_size, "D": head_dim,
            "DPAD": max(16, triton.next_power_of_2(head_dim)), "WINDOW": 2 if chunk else int(window > 0), "SOFTCAP": softcap > 0,
            "SINKS": sinks is not None, "SCALED": kv_scales is not None, "PRECISION": "ieee" if q.element_size() == 4 else "tf32", "PDL": pdl,
            **({"launch_pdl": True} if pdl else {}),
        }  # fmt: skip
        if max_query == 1:
            self._decode(out, tables, 0, numbers, static, window)
            return out
        wide = q.element_size() == 4
        tiles = self.tiles or varlen_tiles(head_dim, wide, static["GROUP"], self.large, max_query)
        # A tile of many tokens is wasted on single-token rows: those take their own kernel then.
        apart = tiles.block_m > 128 if self.apart is None else self.apart
        apart = apart and kv_lens.shape[0] > 1
        grid = (num_kv_heads, tokens // (tiles.block_m // static["GROUP"]) + kv_lens.shape[0])
        _varlen_kernel[grid](
            out, *tables, int(not apart), kv_lens.shape[0], *numbers, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
            **static, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
        if apart:
            self._decode(out, tables, 1, numbers, static, window)
        return out

    def _decode(
        self, out: Tensor, tables: Tables, singles: int, numbers: Numbers, static: dict[str, Any], window: int
    ) -> None:
        """Single-token rows; with ``singles`` there are others among them, which are left alone."""
        rows, num_kv_heads = tables[4].shape[0], tables[1].shape[2]
        num_heads, head_dim = out.shape[1:]
        tiles = decode_tiles(head_dim, out.element_size() == 4, self.large)
        splits = num_splits(rows, num_kv_heads, window, tiles.block_n)
        sums = stats = counters = out
        if splits > 1:
            if self.counters is None:
                self.counters = torch.zeros(TARGET_PROGRAMS, dtype=torch.int32, device=out.device)
            counters = self.counters
            sums = torch.empty((rows, num_heads, splits, head_dim), dtype=torch.float32, device=out.device)
            stats = torch.empty((rows, num_heads, splits, 2), dtype=torch.float32, device=out.device)
        merge = splits <= MERGE_SPLITS
        _decode_kernel[(num_kv_heads, rows, splits)](
            out, sums, stats, counters, *tables, singles, *numbers, GPAD=max(16, triton.next_power_of_2(static["GROUP"])),
            BLOCK_N=tiles.block_n, SPLITS=splits, MERGE=merge, **static,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
        if not merge:
            names = ("D", "DPAD", "WINDOW", "PDL", "launch_pdl")
            _merge_kernel[(num_heads, rows)](
                out, sums, stats, tables[3], tables[4], singles, numbers[1], BLOCK_N=tiles.block_n, SPLITS=splits,
                **{name: static[name] for name in names if name in static}, num_warps=4,
            )  # fmt: skip


PagedAttentionHopper = partial(PagedAttention, large=True, pdl=True)
