"""Paged attention for rows of any length: prefill chunks and decodes are the same items.

An item is some consecutive queries of one sequence over a range of its keys; each (item, kv head) is one piece of work,
handed out by a counter so that long items balance. The queries of all heads that share a kv head form the rows of small
tiles (up to 4 rows x 16 keys).

Keys are taken in stretches of 256 that begin at multiples of 256. A stretch gives a partial result (maximum, total,
unnormalized sum), and partial results are folded in order (Milakov & Gimelshein 2018). A long decode may be cut at
stretch boundaries into parts on several threads; ``combine`` then folds with the same arithmetic. So a token's numbers do
not depend on the batch, the chunk or the thread that computed it, to the last bit. The layout of pages is in ``rope``.
"""

from __future__ import annotations

import math

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from octavo.device.kernels.numba import memory as mem
from octavo.device.kernels.numba import vector as v
from octavo.device.kernels.numba.rows import address_of, emit_write, float_of
from octavo.device.kernels.numba.shared import (
    BLOCK_AT,
    BLOCKS_AT,
    FIRST_KEY,
    HOST,
    ITEM_FIELDS,
    LAST_KEY,
    MAX_HEAD,
    PART,
    PARTIAL_AT,
    POSITION,
    QUERIES,
    QUERIES_AT,
    SCORES_AT,
    SCRATCH_BYTES,
    STRETCH,
    TABLE,
    TILE_ROWS,
    TOKEN,
    WEIGHTS_AT,
)

ITEM_BYTES = ITEM_FIELDS * 8
HIDDEN = -1e30


def scores(rows, target):
    """Intrinsic: scores of ``rows`` query rows against blocks of 16 keys, times ``scale``."""

    @intrinsic
    def compute(context, scratch, blocks, size, scale, value_at):
        def generate(ctx, b, signature, args):
            scratch, blocks, size, scale, value_at = args
            factor = v.splat(b, scale)
            queries = [v.load(b, v.at(b, scratch, QUERIES_AT + 8 * r), v.I64, 8) for r in range(rows)]
            sums = [cgutils.alloca_once(b, v.VF) for _ in range(2 * rows)]
            with cgutils.for_range(b, blocks) as block:
                keys = v.load(b, b.add(v.at(b, scratch, BLOCKS_AT), b.mul(block.index, v.const(8))), v.I64, 8)
                # The values of this block and the keys of the next: the processor does not guess across pages.
                after = v.load(
                    b, b.add(v.at(b, scratch, BLOCKS_AT + 8), b.mul(block.index, v.const(8))), v.I64, 8
                )
                for slot in sums:
                    b.store(v.floats(0.0), slot)
                with cgutils.for_range(b, b.sdiv(size, v.const(4))) as loop:
                    ahead = b.mul(loop.index, v.const(128))
                    for base in (after, b.add(keys, value_at)):
                        v.prefetch(b, b.add(base, ahead))
                        v.prefetch(b, v.at(b, b.add(base, ahead), 64))
                    for half in range(2):
                        pair = v.at(b, b.mul(loop.index, v.const(2)), half)
                        key = v.load(b, b.add(keys, b.mul(pair, v.const(64))), v.VI, 64)
                        for r in range(rows):
                            query = v.load_splat(b, b.add(queries[r], b.mul(pair, v.const(4))), v.I32)
                            slot = sums[2 * r + half]
                            b.store(v.dot_bf16(b, target, b.load(slot, typ=v.VF), key, query), slot)
                out = b.add(v.at(b, scratch, SCORES_AT), b.mul(block.index, v.const(64)))
                for r in range(rows):
                    total = b.fadd(b.load(sums[2 * r], typ=v.VF), b.load(sums[2 * r + 1], typ=v.VF))
                    v.store(b, b.fmul(total, factor), v.at(b, out, r * STRETCH * 4), 4)
            return ctx.get_dummy_value()

        i = types.int64
        return types.void(i, i, i, types.float32, i), generate

    return compute


def mix(rows, target):
    """Intrinsic: probabilities x values of blocks of 16 keys, ``rows`` rows of partial output."""

    def columns(b, scratch, blocks, size, value_at, outputs, column, width):
        """``width`` vectors of 16 output dims from ``column`` on."""
        at = b.mul(column, v.const(4))
        places = [[b.add(out, v.at(b, at, 64 * j)) for j in range(width)] for out in outputs]
        sums = [[cgutils.alloca_once(b, v.VF) for _ in range(width)] for _ in outputs]
        for r in range(rows):
            for j in range(width):
                b.store(v.floats(0.0), sums[r][j])
        with cgutils.for_range(b, blocks) as block:
            keys = v.load(b, b.add(v.at(b, scratch, BLOCKS_AT), b.mul(block.index, v.const(8))), v.I64, 8)
            values = b.add(b.add(keys, value_at), at)
            weights = b.add(v.at(b, scratch, WEIGHTS_AT), b.mul(block.index, v.const(32)))
            for pair in range(8):
                spread = [
                    v.load_splat(b, v.at(b, weights, r * STRETCH * 2 + 4 * pair), v.I32) for r in range(rows)
                ]
                line = b.add(values, b.mul(size, v.const(4 * pair)))
                for j in range(width):
                    value = v.load(b, v.at(b, line, 64 * j), v.VI, 64)
                    for r in range(rows):
                        slot = sums[r][j]
                        b.store(v.dot_bf16(b, target, b.load(slot, typ=v.VF), value, spread[r]), slot)
        for r in range(rows):
            for j in range(width):
                v.store(b, b.load(sums[r][j], typ=v.VF), places[r][j], 4)

    @intrinsic
    def compute(context, scratch, blocks, size, value_at):
        def generate(ctx, b, signature, args):
            scratch, blocks, size, value_at = args
            outputs = [v.at(b, scratch, PARTIAL_AT + MAX_HEAD * 4 * r) for r in range(rows)]
            wide = b.sdiv(size, v.const(64))
            with cgutils.for_range(b, wide) as loop:
                columns(b, scratch, blocks, size, value_at, outputs, b.mul(loop.index, v.const(64)), 4)
            with cgutils.for_range_slice(b, b.mul(wide, v.const(64)), size, v.const(16)) as (column, _):
                columns(b, scratch, blocks, size, value_at, outputs, column, 1)
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    return compute


SCORES_1, SCORES_2, SCORES_3, SCORES_4 = [scores(n, HOST) for n in (1, 2, 3, 4)]
MIX_1, MIX_2, MIX_3, MIX_4 = [mix(n, HOST) for n in (1, 2, 3, 4)]


@intrinsic
def cap_row(context, row, vectors, cap):
    """cap * tanh(x / cap) over 16 x ``vectors`` floats in place."""

    def generate(ctx, b, signature, args):
        cap = v.splat(b, args[2])
        with cgutils.for_range(b, args[1]) as loop:
            at = b.add(args[0], b.mul(loop.index, v.const(64)))
            v.store(b, b.fmul(cap, v.tanh(b, b.fdiv(v.load(b, at, v.VF, 4), cap))), at, 4)
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def largest(context, row, vectors):
    """Largest of 16 x ``vectors`` floats."""

    def generate(_, b, signature, args):
        most = cgutils.alloca_once_value(b, v.floats(HIDDEN))
        with cgutils.for_range(b, args[1]) as loop:
            x = v.load(b, b.add(args[0], b.mul(loop.index, v.const(64))), v.VF, 4)
            b.store(v.maximum(b, b.load(most, typ=v.VF), x), most)
        return v.reduce_max(b, b.load(most, typ=v.VF))

    return types.float32(types.int64, types.int64), generate


@intrinsic
def exponentials(context, row, weights, vectors, most):
    """weights (bfloat16) = e^(row - most), exactly 0 where hidden; returns the sum before rounding."""

    def generate(_, b, signature, args):
        most, total = v.splat(b, args[3]), cgutils.alloca_once_value(b, v.floats(0.0))
        with cgutils.for_range(b, args[2]) as loop:
            x = v.load(b, b.add(args[0], b.mul(loop.index, v.const(64))), v.VF, 4)
            e = v.exp(b, b.fsub(x, most))
            e = b.select(b.fcmp_ordered(">", x, v.floats(HIDDEN)), e, v.floats(0.0))
            v.store(b, v.round_bf16(b, e), b.add(args[1], b.mul(loop.index, v.const(32))), 2)
            b.store(b.fadd(b.load(total, typ=v.VF), e), total)
        return v.reduce_add(b, b.load(total, typ=v.VF))

    i = types.int64
    return types.float32(i, i, i, types.float32), generate


@intrinsic
def fold_row(context, target, source, size, before, now):
    """target = target * before + source * now over ``size`` floats; target is not read where ``before`` is 0."""

    def generate(ctx, b, signature, args):
        before, now = v.splat(b, args[3]), v.splat(b, args[4])
        with cgutils.for_range(b, b.sdiv(args[2], v.const(16))) as loop:
            at = b.mul(loop.index, v.const(64))
            new = b.fmul(v.load(b, b.add(args[1], at), v.VF, 4), now)
            old = v.fma(b, v.load(b, b.add(args[0], at), v.VF, 4), before, new)
            first = b.fcmp_ordered("==", before, v.floats(0.0))
            v.store(b, b.select(first, new, old), b.add(args[0], at), 4)
        return ctx.get_dummy_value()

    i, f = types.int64, types.float32
    return types.void(i, i, i, f, f), generate


@intrinsic
def write_block(context, source, plain, quants, meta):
    """32 floats at ``source`` to ``plain`` and/or ``quants`` + ``meta``."""

    def generate(ctx, b, signature, args):
        low, high = v.load(b, args[0], v.VF, 4), v.load(b, v.at(b, args[0], 64), v.VF, 4)
        emit_write(b, low, high, *args[1:])
        return ctx.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@register_jitable
def multiply(scratch, rows, blocks, size, scale, value_at):
    """Scores of a tile; the row count picks the compiled width."""
    if rows == 4:
        SCORES_4(scratch, blocks, size, scale, value_at)
    elif rows == 3:
        SCORES_3(scratch, blocks, size, scale, value_at)
    elif rows == 2:
        SCORES_2(scratch, blocks, size, scale, value_at)
    else:
        SCORES_1(scratch, blocks, size, scale, value_at)


@register_jitable
def accumulate(scratch, rows, blocks, size, value_at):
    """Probabilities x values of a tile."""
    if rows == 4:
        MIX_4(scratch, blocks, size, value_at)
    elif rows == 3:
        MIX_3(scratch, blocks, size, value_at)
    elif rows == 2:
        MIX_2(scratch, blocks, size, value_at)
    else:
        MIX_1(scratch, blocks, size, value_at)


@register_jitable
def hide(row, start, stop):
    """Scores start..stop-1 of a row cannot be seen."""
    for t in range(start, stop):
        mem.store_f32(row + 4 * t, types.float32(HIDDEN))


@register_jitable
def tile(args, scratch, item, h, row0, rows):
    """Rows row0.. of an item (query x head of the group) against all its keys."""
    heads, kv_heads, size = address_of(args, 2), address_of(args, 3), address_of(args, 4)
    pages, page_bytes, page_size = address_of(args, 6), address_of(args, 7), address_of(args, 8)
    scale, cap, window = float_of(args, 9), float_of(args, 10), address_of(args, 11)
    group, value_at = heads // kv_heads, page_size * size * 2
    token, position = mem.load_i64(item + 8 * TOKEN), mem.load_i64(item + 8 * POSITION)
    first, last = mem.load_i64(item + 8 * FIRST_KEY), mem.load_i64(item + 8 * LAST_KEY)
    table, part = mem.load_i64(item + 8 * TABLE), mem.load_i64(item + 8 * PART)
    for r in range(rows):
        query, head = (row0 + r) // group, h * group + (row0 + r) % group
        mem.store_i64(
            scratch + QUERIES_AT + 8 * r, address_of(args, 5) + ((token + query) * heads + head) * size * 2
        )
        stats = address_of(args, 13) + ((part + query) * heads + head) * 8
        mem.store_f32(stats, types.float32(HIDDEN))
        mem.store_f32(stats + 4, types.float32(0))
    # A later row of the tile may see more: the tile's keys end with its last row's.
    last = min(last, position + (row0 + rows - 1) // group + 1)
    start = first // 16 * 16
    while start < last:
        stop = min((start // STRETCH + 1) * STRETCH, (last + 15) // 16 * 16)
        blocks = (stop - start) // 16
        for i in range(blocks):
            at = start + 16 * i
            page = types.int64(mem.load_i32(table + at // page_size * 4))
            inside = h * page_size * size * 4 + at % page_size * size * 2
            address = pages + page * page_bytes + inside
            mem.store_i64(scratch + BLOCKS_AT + 8 * i, address)
            mem.store_i64(scratch + BLOCKS_AT + 8 * i + 8, address)
        multiply(scratch, rows, blocks, size, scale, value_at)
        for r in range(rows):
            row, query = scratch + SCORES_AT + r * STRETCH * 4, (row0 + r) // group
            if cap != types.float32(0):
                cap_row(row, blocks, cap)
            seen = min(last, position + query + 1)
            low = max(first, position + query + 1 - window) if window > 0 else first
            hide(row, 0, min(low, stop) - start)
            hide(row, max(seen, start) - start, stop - start)
            most = largest(row, blocks)
            total = exponentials(row, scratch + WEIGHTS_AT + r * STRETCH * 2, blocks, most)
            mem.store_f32(scratch + BLOCK_AT + 8 * r, most)
            mem.store_f32(scratch + BLOCK_AT + 8 * r + 4, total)
        accumulate(scratch, rows, blocks, size, value_at)
        for r in range(rows):
            query, head = (row0 + r) // group, h * group + (row0 + r) % group
            place = (part + query) * heads + head
            source = scratch + PARTIAL_AT + r * MAX_HEAD * 4
            fold(
                address_of(args, 13) + place * 8,
                address_of(args, 12) + place * size * 4,
                scratch + BLOCK_AT + 8 * r,
                source,
                size,
            )
        start = stop


@register_jitable
def fold(stats, target, new_stats, source, size):
    """Fold a partial result (maximum, total; sums) into another; one without keys changes nothing."""
    before, most = mem.load_f32(stats), mem.load_f32(new_stats)
    if most <= types.float32(HIDDEN):
        return
    top = max(before, most)
    keep = types.float32(math.exp(before - top)) if before > types.float32(HIDDEN) else types.float32(0)
    take = types.float32(math.exp(most - top))
    mem.store_f32(stats, top)
    mem.store_f32(stats + 4, mem.load_f32(stats + 4) * keep + mem.load_f32(new_stats + 4) * take)
    fold_row(target, source, size, keep, take)


def attend(args, thread, threads):
    """args: item count, items, heads, kv heads, head dim, q (bfloat16), the layer's first page, bytes between pages, page size, scale,
    softcap (0 = none), window (0 = none), out [parts, heads, D], stats [parts, heads, 2] (maximum, total), scratch, work
    counter."""
    kv_heads, group = address_of(args, 3), address_of(args, 2) // address_of(args, 3)
    total = mem.load_i64(address_of(args, 0)) * kv_heads
    scratch, counter = address_of(args, 14) + thread * SCRATCH_BYTES, address_of(args, 15)
    work = mem.atomic_add(counter, 1)
    while work < total:
        item = address_of(args, 1) + work // kv_heads * ITEM_BYTES
        rows = mem.load_i64(item + 8 * QUERIES) * group
        row = 0
        while row < rows:
            count = min(TILE_ROWS, rows - row)
            tile(args, scratch, item, work % kv_heads, row, count)
            row += count
        work = mem.atomic_add(counter, 1)


@register_jitable
def join(args, block, half, m, head, dim):
    """16 normalized outputs of one head of token m, folded over the parts of a split context."""
    heads, size = address_of(args, 3), address_of(args, 4)
    out, stats, splits = address_of(args, 1), address_of(args, 2), address_of(args, 5)
    extra, count = mem.load_i64(splits + 16 * m), mem.load_i64(splits + 16 * m + 8)
    target, summary = block + 64 * half, block + 128
    if count == 0:  # the usual case; the fold below would do the same
        place = m * heads + head
        whole = mem.load_f32(stats + place * 8 + 4)
        fold_row(target, out + (place * size + dim) * 4, 16, types.float32(0), types.float32(1) / whole)
        return
    mem.store_f32(summary, types.float32(HIDDEN))
    mem.store_f32(summary + 4, types.float32(0))
    for i in range(count + 1):
        place = (m if i == 0 else extra + i - 1) * heads + head
        fold(summary, target, stats + place * 8, out + (place * size + dim) * 4, 16)
    fold_row(target, target, 16, types.float32(0), types.float32(1) / mem.load_f32(summary + 4))


def combine(args, thread, threads):
    """Join parts, normalize, quantize. args: count, out, stats, heads, head dim, splits [tokens] (first extra part,
    number), plain, quants, meta, scratch."""
    tokens, heads, size = mem.load_i64(address_of(args, 0)), address_of(args, 3), address_of(args, 4)
    plain, quants, meta = address_of(args, 6), address_of(args, 7), address_of(args, 8)
    block_at = address_of(args, 9) + thread * SCRATCH_BYTES + BLOCK_AT
    blocks = heads * size // 32
    first, last = tokens * blocks * thread // threads, tokens * blocks * (thread + 1) // threads
    for item in range(first, last):
        m, column = item // blocks, item % blocks * 32
        for half in range(2):
            at = column + 16 * half
            join(args, block_at, half, m, at // size, at % size)
        write_block(
            block_at,
            0 if plain == 0 else plain + item * 128,
            0 if quants == 0 else quants + item * 32,
            meta + item * 16,
        )
