"""Mixtures of experts: which experts a token visits, its visits sorted by expert, and the sum of what they give.

    route | deal | gather | experts (gate, up) | gate | experts (down) | merge

A visit is one (token, chosen expert). ``deal`` gives the visits of an expert neighbouring rows, ``gather`` copies the
tokens there, and ``experts`` lets the kernel of an ordinary linear multiply them, expert by expert. A token's sum is taken
in the order of its choices, so its numbers do not depend on who else visits.
"""

from __future__ import annotations

import math

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from octavo.device.kernels.numba import memory as mem
from octavo.device.kernels.numba import vector as v
from octavo.device.kernels.numba.rows import address_of, float_of
from octavo.device.kernels.numba.shared import (
    BLOCKS,
    COUNT,
    LOWER,
    META,
    META_BYTES,
    OUT,
    OUT_BYTES,
    QUANTS,
    SCALES,
    VISITOR_BYTES,
    WEIGHTS,
)

NOTHING = -math.inf


@register_jitable
def logistic(x):
    """1 / (1 + e^-x)."""
    return types.float32(1) / (types.float32(1) + types.float32(math.exp(-x)))


@register_jitable
def choose(row, num):
    """The first largest of ``num`` floats, which becomes -inf; -1 where all are -inf or NaN."""
    best, most = -1, types.float32(NOTHING)
    for e in range(num):
        x = mem.load_f32(row + 4 * e)
        if x > most:
            best, most = e, x
    if best >= 0:
        mem.store_f32(row + 4 * best, types.float32(NOTHING))
    return best, most


def route(args, thread, threads):
    """The ``top_k`` experts of each token and their shares; the logits are used up. args: count, logits, bytes of a row of
    them, experts, top_k, scoring (0: softmax over all, 1: sigmoid of each, 2: softmax over the chosen), whether shares
    sum to 1, scale, chosen [tokens, top_k] int64, shares [tokens, top_k] float32. A token whose logits are not finite gets
    shares that are not numbers."""
    tokens, logits, row_bytes = mem.load_i64(address_of(args, 0)), address_of(args, 1), address_of(args, 2)
    num, top_k, scoring = address_of(args, 3), address_of(args, 4), address_of(args, 5)
    renormalize, scale = address_of(args, 6), float_of(args, 7)
    for m in range(tokens * thread // threads, tokens * (thread + 1) // threads):
        row = logits + m * row_bytes
        chosen, shares = address_of(args, 8) + 8 * m * top_k, address_of(args, 9) + 4 * m * top_k
        top, total = types.float32(NOTHING), types.float32(0)
        for e in range(num):
            top = max(top, mem.load_f32(row + 4 * e))
        for e in range(num if scoring == 0 else 0):
            total += types.float32(math.exp(mem.load_f32(row + 4 * e) - top))
        kept = types.float32(0)
        for k in range(top_k):
            best, most = choose(row, num)
            share = logistic(most) if scoring == 1 else types.float32(math.exp(most - top))
            if best < 0:
                best, share = k, types.float32(math.nan)
            kept += share
            mem.store_i64(chosen + 8 * k, best)
            mem.store_f32(shares + 4 * k, share)
        factor = scale
        if scoring == 2 or renormalize != 0:
            factor = scale / kept
        elif scoring == 0:
            factor = scale / total
        for k in range(top_k):
            mem.store_f32(shares + 4 * k, mem.load_f32(shares + 4 * k) * factor)


def deal(args, thread, threads):
    """Sort visits by expert. args: count, top_k, experts, chosen, place [visits] (the row of each), source [visits] (the
    token of each row), offsets [experts + 1] (first row), active [1 + experts] (how many have visits; which), visits
    (receives their number), scratch [experts]."""
    if thread != 0:
        return
    top_k, num, chosen = address_of(args, 1), address_of(args, 2), address_of(args, 3)
    place, source, offsets = address_of(args, 4), address_of(args, 5), address_of(args, 6)
    active, cursor = address_of(args, 7), address_of(args, 9)
    visits = mem.load_i64(address_of(args, 0)) * top_k
    mem.store_i64(address_of(args, 8), visits)
    for e in range(num):
        mem.store_i64(cursor + 8 * e, 0)
    for i in range(visits):
        at = cursor + 8 * mem.load_i64(chosen + 8 * i)
        mem.store_i64(at, mem.load_i64(at) + 1)
    first, found = 0, 0
    for e in range(num):
        count = mem.load_i64(cursor + 8 * e)
        mem.store_i64(offsets + 8 * e, first)
        mem.store_i64(cursor + 8 * e, first)
        first += count
        if count > 0:
            found += 1
            mem.store_i64(active + 8 * found, e)
    mem.store_i64(offsets + 8 * num, first)
    mem.store_i64(active, found)
    for i in range(visits):
        at = cursor + 8 * mem.load_i64(chosen + 8 * i)
        row = mem.load_i64(at)
        mem.store_i64(at, row + 1)
        mem.store_i64(place + 8 * i, row)
        mem.store_i64(source + 8 * row, i // top_k)


def gather(args, thread, threads):
    """Copy tokens to the rows of their visits. args: visits, source, then three times from (0 = nothing), to, bytes of a
    row (a multiple of 16)."""
    visits, source = mem.load_i64(address_of(args, 0)), address_of(args, 1)
    for row in range(visits * thread // threads, visits * (thread + 1) // threads):
        token = mem.load_i64(source + 8 * row)
        for i in range(3):
            start, size = address_of(args, 2 + 3 * i), address_of(args, 4 + 3 * i)
            if start != 0:
                for at in range(0, size, 8):
                    value = mem.load_i64(start + token * size + at)
                    mem.store_i64(address_of(args, 3 + 3 * i) + row * size + at, value)


def experts(args, thread, threads):
    """Each active expert's matrix times its visits. args: kernel of a linear, its table for expert 0, entries of the
    table, active, offsets, bytes of weights and of scales of an expert, whether tokens are int8, scratch [threads,
    VISITOR_BYTES]."""
    base, entries = address_of(args, 1), address_of(args, 2)
    active, offsets = address_of(args, 3), address_of(args, 4)
    table = address_of(args, 8) + thread * VISITOR_BYTES
    for entry in range(entries):
        mem.store_i64(table + 8 * entry, address_of(base, entry))
    count_at = table + 8 * (LOWER + 1)
    mem.store_i64(table + 8 * COUNT, count_at)
    for i in range(mem.load_i64(active)):
        e = mem.load_i64(active + 8 * i + 8)
        first = mem.load_i64(offsets + 8 * e)
        mem.store_i64(count_at, mem.load_i64(offsets + 8 * e + 8) - first)
        mem.store_i64(table + 8 * WEIGHTS, address_of(base, WEIGHTS) + e * address_of(args, 5))
        mem.store_i64(table + 8 * SCALES, address_of(base, SCALES) + e * address_of(args, 6))
        blocks = address_of(base, BLOCKS)
        if address_of(args, 7) != 0:
            mem.store_i64(table + 8 * QUANTS, address_of(base, QUANTS) + first * blocks * 32)
            mem.store_i64(table + 8 * META, address_of(base, META) + first * blocks * META_BYTES)
        else:
            mem.store_i64(table + 8 * QUANTS, address_of(base, QUANTS) + first * blocks * 128)
        mem.store_i64(table + 8 * OUT, address_of(base, OUT) + first * address_of(base, OUT_BYTES))
        mem.call_kernel(address_of(args, 0), table, thread, threads)


@intrinsic
def merge_block(context, x, out, place, shares, top_k, stride, alpha, y, share):
    """16 values: x += alpha * (sum over k of shares[k] * out[place[k]] + share * y); y 0 = none."""

    def generate(ctx, b, signature, args):
        x, out, place, shares, top_k, stride, alpha, y, share = args
        total = cgutils.alloca_once_value(b, v.floats(0.0))
        with cgutils.for_range(b, top_k) as loop:
            row = v.load(b, b.add(place, b.mul(loop.index, v.const(8))), v.I64, 8)
            factor = v.load_splat(b, b.add(shares, b.mul(loop.index, v.const(4))))
            value = v.load(b, b.add(out, b.mul(row, stride)), v.VF, 4)
            b.store(v.fma(b, value, factor, b.load(total, typ=v.VF)), total)
        with b.if_then(b.icmp_signed("!=", y, v.const(0))):
            shared = v.load(b, y, v.VF, 4)
            b.store(v.fma(b, shared, v.splat(b, share), b.load(total, typ=v.VF)), total)
        whole = v.fma(b, b.load(total, typ=v.VF), v.splat(b, alpha), v.load(b, x, v.VF, 4))
        v.store(b, whole, x, 4)
        return ctx.get_dummy_value()

    i, f = types.int64, types.float32
    return types.void(i, i, i, i, i, i, f, i, f), generate


def merge(args, thread, threads):
    """x += alpha * (what the experts give, weighed by shares, + the shared expert's y, weighed by the logistic of its
    gate). args: count, out [visits, hidden], hidden, place, shares, top_k, alpha, x, y (0 = none), gate (0 = y counts
    whole), bytes of a row of gates."""
    tokens, out, size = mem.load_i64(address_of(args, 0)), address_of(args, 1), address_of(args, 2)
    top_k, alpha, x = address_of(args, 5), float_of(args, 6), address_of(args, 7)
    y, gates, vectors = address_of(args, 8), address_of(args, 9), size // 16
    for item in range(tokens * vectors * thread // threads, tokens * vectors * (thread + 1) // threads):
        m, at = item // vectors, item % vectors * 64
        share = types.float32(1)
        if gates != 0:
            share = logistic(mem.load_f32(gates + m * address_of(args, 10)))
        merge_block(
            x + m * size * 4 + at,
            out + at,
            address_of(args, 3) + 8 * m * top_k,
            address_of(args, 4) + 4 * m * top_k,
            top_k,
            size * 4,
            alpha,
            0 if y == 0 else y + m * size * 4 + at,
            share,
        )
