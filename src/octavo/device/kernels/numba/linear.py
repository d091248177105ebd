"""out[m, n] = alpha * sum_k a[m, k] w[n, k] + bias[n] (+ out[m, n]): int8 tokens times panels of quantized rows.

A tile is 16 rows x up to 8 tokens: the unpacked weights of a block stay in registers while the tokens pass. Tokens are
int8 per 32 with four floats each (``META``): scale d, d * sum(q), and the same sum over the first and the second 16.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from octavo.device.kernels.numba import formats
from octavo.device.kernels.numba import vector as v
from octavo.device.kernels.numba.shared import (
    ADD,
    ALPHA,
    BIAS,
    BIAS_BYTES,
    BLOCKS,
    COUNT,
    HOST,
    LOWER,
    META,
    META_BYTES,
    OUT,
    OUT_BYTES,
    PANELS,
    QUANTS,
    SCALES,
    WEIGHTS,
)
from octavo.device.kernels.numba.target import Target

FIRST_LEVEL, SECOND_LEVEL = 20 << 10, 256 << 10  # bytes of the caches that tokens and panels may take
AHEAD = 16  # blocks between fetching weights and using them: the processor's own guess stops at 4 KiB borders
ENTRIES = 13  # of a table without LOWER, the second plane of a split format
TOKENS, TOKEN_BYTES = QUANTS, META  # dense kernels: float32 tokens and the bytes of one


def load_args(b, args, count):
    """The first ``count`` entries of an argument table."""
    return [v.load(b, v.at(b, args, 8 * i), v.I64, 8) for i in range(count)]


def share(b, total, thread, threads):
    """This thread's range of ``total`` items."""
    first = b.sdiv(b.mul(total, thread), threads)
    last = b.sdiv(b.mul(total, b.add(thread, v.const(1))), threads)
    return first, last


def unpack_split(b, address, lower):
    """The 8 vectors of a block in two planes."""
    six, words = unpack_block(b, formats.UPPER6, address), v.vector(v.I16, 32)
    out = []
    for g, upper in enumerate(six):
        pair = b.bitcast(v.load(b, v.at(b, lower, g // 4 * 64), v.VBYTES, 64), words)
        pair = b.lshr(pair, v.ints(2 * (g % 4), words)) if g % 4 else pair
        moved = b.bitcast(b.shl(b.bitcast(upper, words), v.ints(2, words)), v.VBYTES)
        out.append(b.or_(moved, b.and_(b.bitcast(pair, v.VBYTES), v.ints(3, v.VBYTES))))
    return out


def add_bits(b, vectors, address, value):
    """One more bit of each weight, worth ``value``: 64 bytes, in order."""
    bits = v.vector(ir.IntType(1), 64)
    for g, vector in enumerate(vectors):
        there = b.bitcast(v.load(b, v.at(b, address, 8 * g), v.I64, 8), bits)
        vectors[g] = b.select(there, b.or_(vector, v.ints(value, v.VBYTES)), vector)
    return vectors


def unpack_pairs(b, form, address):
    """The 8 vectors of a block of 2 or 3 bits."""
    out, words = [], v.vector(v.I16, 32)
    for half in range(2):
        four = b.bitcast(v.load(b, v.at(b, address, 64 * half), v.VBYTES, 64), words)
        for g in range(4):
            pair = b.lshr(four, v.ints(2 * g, words)) if g else four
            out.append(b.and_(b.bitcast(pair, v.VBYTES), v.ints(3, v.VBYTES)))
    return add_bits(b, out, v.at(b, address, 128), 4) if form.bits == 3 else out


def unpack_block(b, form, address, lower=None):
    """The 8 vectors <64 x i8> of a block; see ``formats`` for the layout."""
    if form.split:
        return unpack_split(b, address, lower)
    if form.bits == 8:
        return [v.load(b, v.at(b, address, 64 * g), v.VBYTES, 64) for g in range(8)]
    if form.bits < 4:
        return unpack_pairs(b, form, address)
    low, high = [], []
    mask, shift = v.ints(15, v.VBYTES), v.ints(4, v.vector(v.I16, 32))
    for g in range(4):
        both = v.load(b, v.at(b, address, 64 * g), v.VBYTES, 64)
        low.append(b.and_(both, mask))
        moved = b.bitcast(b.lshr(b.bitcast(both, shift.type), shift), v.VBYTES)
        high.append(b.and_(moved, mask))
    out = low + high
    if form.bits == 5:
        out = add_bits(b, out, v.at(b, address, 256), 16)
    if form.bits == 6:
        words = v.vector(v.I16, 32)
        for g in range(8):
            pair = b.bitcast(v.load(b, v.at(b, address, 256 + g // 4 * 64), v.VBYTES, 64), words)
            move = 4 - 2 * (g % 4)
            pair = b.shl(pair, v.ints(move, words)) if move >= 0 else b.lshr(pair, v.ints(-move, words))
            out[g] = b.or_(out[g], b.and_(b.bitcast(pair, v.VBYTES), v.ints(48, v.VBYTES)))
    return out


def _bytes_to_float(b, address, signed):
    kind = v.vector(v.I8)
    raw = v.load(b, address, kind, 16)
    return b.sitofp(b.sext(raw, v.VI), v.VF) if signed else b.uitofp(b.zext(raw, v.VI), v.VF)


def _halves(b, target, address):
    return v.widen_half(b, v.load(b, address, v.vector(v.I16), 32), target)


def block_scales(b, target, form, address, outer, inner):
    """(scale of weights 0..15, scale of 16..31, minimum or (minimum, minimum) of the halves) of a block."""
    zero = 0 if form.value_bits == 8 and target.signed_bytes else form.zero
    if form.scheme == "zero":
        scale = _halves(b, target, address)
        return scale, scale, b.fmul(scale, v.floats(-zero)) if zero else None
    if form.scheme == "min":
        scale = _halves(b, target, address)
        return scale, scale, _halves(b, target, v.at(b, address, 32))
    if form.scheme == "super":
        entry = b.add(v.at(b, address, 64), b.mul(inner, v.const(32)))
        scale = b.fmul(outer[0], _bytes_to_float(b, entry, False))
        low = b.fmul(outer[1], _bytes_to_float(b, v.at(b, entry, 16), False))
        return scale, scale, b.fneg(low)
    if form.scheme == "super32":
        entry = b.add(v.at(b, address, 32), b.mul(inner, v.const(16)))
        scale = b.fmul(outer[0], _bytes_to_float(b, entry, True))
        return scale, scale, b.fmul(scale, v.floats(-zero)) if zero else None
    if form.scheme == "super16min":
        entry = b.add(v.at(b, address, 64), b.mul(inner, v.const(32)))
        fields = [_bytes_to_float(b, v.at(b, entry, place), False) for place in (0, 16, 256, 272)]
        low = tuple(b.fneg(b.fmul(outer[1], field)) for field in fields[2:])
        return b.fmul(outer[0], fields[0]), b.fmul(outer[0], fields[1]), low
    entry = b.add(v.at(b, address, 32), b.mul(inner, v.const(32)))
    first = b.fmul(outer[0], _bytes_to_float(b, entry, True))
    second = b.fmul(outer[0], _bytes_to_float(b, v.at(b, entry, 16), True))
    return first, second, (b.fmul(first, v.floats(-zero)), b.fmul(second, v.floats(-zero)))


def block_tokens(b, target, form, weights, scales, quants, meta, strides, sums):
    """Add one block's products to the running sums, token by token."""
    first, second, low = scales
    for m, slot in enumerate(sums):
        token = b.add(quants, b.mul(strides[0], v.const(m)))
        facts = b.add(meta, b.mul(strides[1], v.const(m)))
        halves = [v.ints(0), v.ints(0)]
        for g in range(8):
            spread = b.bitcast(v.load_splat(b, v.at(b, token, 4 * g), v.I32, 4), v.VBYTES)
            halves[g // 4] = v.dot_bytes(b, target, halves[g // 4], weights[g], spread, form.value_bits)
        d = v.load_splat(b, facts)
        total = b.load(slot, typ=v.VF)
        if isinstance(low, tuple):
            total = v.fma(b, b.sitofp(halves[0], v.VF), b.fmul(first, d), total)
            total = v.fma(b, b.sitofp(halves[1], v.VF), b.fmul(second, d), total)
            total = v.fma(b, low[0], v.load_splat(b, v.at(b, facts, 8)), total)
            total = v.fma(b, low[1], v.load_splat(b, v.at(b, facts, 12)), total)
        else:
            total = v.fma(b, b.sitofp(b.add(*halves), v.VF), b.fmul(first, d), total)
            if low is not None:
                total = v.fma(b, low, v.load_splat(b, v.at(b, facts, 4)), total)
        b.store(total, slot)


def prefetch_block(b, start, index, size, near):
    """Fetch the block of ``size`` bytes that will be used AHEAD blocks from now.

    ``near`` (see ``vector.prefetch``) is a fifth faster for matrices that the caches hold in part (measured on Zen 4), and not
    for the long way through an output matrix.
    """
    ahead = b.add(start, b.mul(b.add(index, v.const(AHEAD)), v.const(size)))
    for line in range(0, size, 64):
        v.prefetch(b, v.at(b, ahead, line), near)


def panel_planes(b, form, values, blocks, p):
    """Addresses of panel ``p`` in each plane."""
    starts = [values[WEIGHTS], values[LOWER]] if form.split else [values[WEIGHTS]]
    return [b.add(start, b.mul(p, b.mul(blocks, v.const(size)))) for start, size in zip(starts, form.planes)]


def quantized_tile(b, target, form, tokens, a, panel, fetch):
    """Sums of one panel over ``tokens`` tokens: a list of <16 x float>. ``a``: named argument values.

    ``fetch``: bring the weights in ahead of use; worth its instructions only the first time a panel is read.
    """
    sums = [cgutils.alloca_once(b, v.VF) for _ in range(tokens)]
    for slot in sums:
        b.store(v.floats(0.0), slot)
    strides = (b.mul(a["blocks"], v.const(32)), b.mul(a["blocks"], v.const(META_BYTES)))
    per_group = form.group // formats.BLOCK
    with cgutils.for_range(b, b.sdiv(a["blocks"], v.const(per_group))) as outer_loop:
        scale_at = b.add(panel["scales"], b.mul(outer_loop.index, v.const(form.group_bytes)))
        outer = []
        if per_group > 1:
            outer = [_halves(b, target, scale_at)]
            if form.scheme in ("super", "super16min"):
                outer.append(_halves(b, target, v.at(b, scale_at, 32)))

        def block(index, inner):
            planes = []
            for start, size in zip(panel["planes"], form.planes):
                if fetch:
                    prefetch_block(b, start, index, size, True)
                planes.append(b.add(start, b.mul(index, v.const(size))))
            weights = unpack_block(b, form, *planes)
            if form.table:
                weights = [v.look_up(b, target, form.table, vector) for vector in weights]
            scales = block_scales(b, target, form, scale_at, outer, inner)
            quants = b.add(panel["quants"], b.mul(index, v.const(32)))
            meta = b.add(panel["meta"], b.mul(index, v.const(META_BYTES)))
            block_tokens(b, target, form, weights, scales, quants, meta, strides, sums)

        if per_group == 1:
            block(outer_loop.index, v.const(0))
        else:
            with cgutils.for_range(b, v.const(per_group)) as inner_loop:
                index = b.add(b.mul(outer_loop.index, v.const(per_group)), inner_loop.index)
                block(index, inner_loop.index)
    return [b.load(slot, typ=v.VF) for slot in sums]


def write_tile(b, sums, a, out, bias):
    """out = alpha * sums + bias, or += where the ADD argument is set."""
    alpha, shift = v.splat(b, a["alpha"]), v.load(b, bias, v.VF, 4)
    for m, total in enumerate(sums):
        target = b.add(out, b.mul(a["out_bytes"], v.const(m)))
        total = v.fma(b, total, alpha, shift)
        with b.if_else(a["add"]) as (adds, sets):
            with adds:
                v.store(b, b.fadd(total, v.load(b, target, v.VF, 4)), target, 4)
            with sets:
                v.store(b, total, target, 4)


def over_tiles(b, tiles, tokens, body):
    """Call ``body(size, first token, first)`` so that tiles of the given sizes, largest first, cover ``tokens``.

    ``first`` is False only for repetitions of the largest tile.
    """
    done = cgutils.alloca_once_value(b, v.const(0))

    def tile(size, first):
        body(size, b.load(done, typ=v.I64), first)
        b.store(b.add(b.load(done, typ=v.I64), v.const(size)), done)

    with b.if_then(b.icmp_signed(">=", tokens, v.const(tiles[0]))):
        tile(tiles[0], True)
    for size in tiles:
        left = b.sub(tokens, b.load(done, typ=v.I64))
        with cgutils.for_range(b, b.sdiv(left, v.const(size))):
            tile(size, size != tiles[0])


def over_blocks(b, panels, tokens, sizes, tile, body):
    """Call ``body(panel, first token, tokens)`` for a range of panels times ``tokens`` tokens, blocked for the caches.

    Some panels, as many as half of the second level holds, meet all tokens a few at a time: as many tokens as stay in the
    first level while those panels pass. ``sizes``: bytes of a panel and of a token; ``tile``: least number of tokens.
    """

    def at_least(x, least):
        return b.select(b.icmp_signed("<", x, v.const(least)), v.const(least), x)

    def until(x, end):
        return b.select(b.icmp_signed("<", x, end), x, end)

    group = at_least(b.sdiv(v.const(SECOND_LEVEL), sizes[0]), 1)
    some = b.mul(at_least(b.sdiv(v.const(FIRST_LEVEL), b.mul(sizes[1], v.const(tile))), 1), v.const(tile))
    with cgutils.for_range_slice(b, panels[0], panels[1], group) as (start, _):
        end = until(b.add(start, group), panels[1])
        with cgutils.for_range_slice(b, v.const(0), tokens, some) as (at, _):
            count = b.sub(until(b.add(at, some), tokens), at)
            with cgutils.for_range_slice(b, start, end, v.const(1)) as (p, _):
                body(p, at, count)


def _emit_panels(b, target, form, values, thread, threads):
    """The whole kernel: this thread's panels times all tokens."""
    a = {
        "blocks": values[BLOCKS],
        "out_bytes": values[OUT_BYTES],
        "alpha": b.bitcast(b.trunc(values[ALPHA], v.I32), v.F32),
        "add": b.icmp_signed("!=", values[ADD], v.const(0)),
    }
    tokens = v.load(b, values[COUNT], v.I64, 8)
    groups = b.sdiv(a["blocks"], v.const(form.group // formats.BLOCK))
    scale_bytes = b.mul(groups, v.const(form.group_bytes))
    panel_bytes = b.mul(a["blocks"], v.const(sum(form.planes)))
    token_bytes = b.mul(a["blocks"], v.const(32 + META_BYTES))
    range_ = share(b, values[PANELS], thread, threads)

    def panel_tokens(p, at, count):
        """One panel times ``count`` tokens from ``at`` on."""
        planes = panel_planes(b, form, values, a["blocks"], p)
        scales = b.add(values[SCALES], b.mul(p, scale_bytes))
        bias = b.add(values[BIAS], b.mul(p, values[BIAS_BYTES]))

        def tile(size, m, first):
            m = b.add(m, at)
            panel = {
                "planes": planes,
                "scales": scales,
                "quants": b.add(values[QUANTS], b.mul(m, b.mul(a["blocks"], v.const(32)))),
                "meta": b.add(values[META], b.mul(m, b.mul(a["blocks"], v.const(META_BYTES)))),
            }
            out = b.add(b.add(values[OUT], b.mul(p, v.const(64))), b.mul(m, a["out_bytes"]))
            write_tile(b, quantized_tile(b, target, form, size, a, panel, first), a, out, bias)

        over_tiles(b, target.tiles, count, tile)

    over_blocks(b, range_, tokens, (panel_bytes, token_bytes), target.tiles[0], panel_tokens)


def quantized(form: formats.PanelFormat, target: Target):
    """The kernel of one panel format as an intrinsic (args, thread, threads)."""

    @intrinsic
    def linear(context, args, thread, threads):
        def generate(ctx, b, signature, values):
            entries = ENTRIES + (1 if form.split else 0)
            _emit_panels(b, target, form, load_args(b, values[0], entries), values[1], values[2])
            return ctx.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), generate

    return linear


ZERO4 = quantized(formats.ZERO4, HOST)
MIN4 = quantized(formats.MIN4, HOST)
ZERO5 = quantized(formats.ZERO5, HOST)
MIN5 = quantized(formats.MIN5, HOST)
ZERO8 = quantized(formats.ZERO8, HOST)
SUPER4 = quantized(formats.SUPER4, HOST)
SUPER5 = quantized(formats.SUPER5, HOST)
SUPER6 = quantized(formats.SUPER6, HOST)
SPLIT8 = quantized(formats.SPLIT8, HOST)
SUPER2 = quantized(formats.SUPER2, HOST)
SUPER3 = quantized(formats.SUPER3, HOST)
TABLE4 = quantized(formats.TABLE4, HOST)
SUPER_TABLE4 = quantized(formats.SUPER_TABLE4, HOST)


def linear_zero4(args, thread, threads):
    """Q4_0 panels."""
    ZERO4(args, thread, threads)


def linear_min4(args, thread, threads):
    """Q4_1 panels."""
    MIN4(args, thread, threads)


def linear_zero5(args, thread, threads):
    """Q5_0 panels."""
    ZERO5(args, thread, threads)


def linear_min5(args, thread, threads):
    """Q5_1 panels."""
    MIN5(args, thread, threads)


def linear_zero8(args, thread, threads):
    """Q8_0 panels."""
    ZERO8(args, thread, threads)


def linear_split8(args, thread, threads):
    """Q8_0 panels in two planes."""
    SPLIT8(args, thread, threads)


def linear_super2(args, thread, threads):
    """Q2_K panels."""
    SUPER2(args, thread, threads)


def linear_super3(args, thread, threads):
    """Q3_K panels."""
    SUPER3(args, thread, threads)


def linear_super4(args, thread, threads):
    """Q4_K panels."""
    SUPER4(args, thread, threads)


def linear_super5(args, thread, threads):
    """Q5_K panels."""
    SUPER5(args, thread, threads)


def linear_super6(args, thread, threads):
    """Q6_K panels."""
    SUPER6(args, thread, threads)


def linear_table4(args, thread, threads):
    """IQ4_NL panels."""
    TABLE4(args, thread, threads)


def linear_supertable4(args, thread, threads):
    """IQ4_XS panels."""
    SUPER_TABLE4(args, thread, threads)
