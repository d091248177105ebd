"""Row kernels: embedding gather, RMSNorm, gated activation, and the int8 quantization fused behind them.

Quantization (per 32 values): d = max|x| / 127, q = round(x / d), meta = (d, d * sum q, d * sum q[:16], d * sum q[16:]).
A NaN anywhere in a normed row makes every d NaN, so it reaches that row's logits and no other row's.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from octavo.device.kernels.numba import memory as mem
from octavo.device.kernels.numba import vector as v
from octavo.device.kernels.numba.formats import BITS, IQ4, ZEROS
from octavo.device.kernels.numba.shared import HOST


def emit_quantize(b, low, high, quants, meta):
    """Quantize 32 values (two <16 x float>) to 32 int8 and four floats in memory."""
    # Magnitudes compare as integers, and a NaN as the largest of them: it ends up in d.
    mask = v.ints(0x7FFFFFFF)
    first, second = (b.and_(b.bitcast(x, v.VI), mask) for x in (low, high))
    size = b.select(b.icmp_signed(">", first, second), first, second)
    for distance in (8, 4, 2, 1):
        other = v.rotate_lanes(b, size, distance)
        size = b.select(b.icmp_signed(">", size, other), size, other)
    largest = b.bitcast(size, v.VF)
    d = b.fmul(largest, v.floats(1 / 127))
    positive = b.fcmp_ordered(">", largest, v.floats(0.0))
    scale = b.select(positive, b.fdiv(v.floats(127.0), largest), v.floats(0.0))
    whole = []
    for half, x in enumerate((low, high)):
        rounded = v.call(b, "llvm.rint.v16f32", v.VF, b.fmul(x, scale))
        whole.append(b.fptosi(rounded, v.VI))  # a NaN becomes some byte; d is NaN then
        v.store(b, b.trunc(whole[-1], v.vector(v.I8)), v.at(b, quants, 16 * half), 16)
    # Both sums at once: lanes 0-7 add up the first half, lanes 8-15 the second.
    joined = [
        b.shuffle_vector(
            *whole, ir.Constant(v.VI, [start + i + 16 * (i > 7) - 8 * (i > 7) for i in range(16)])
        )
        for start in (0, 8)
    ]
    sums = b.add(*joined)
    for distance in (4, 2, 1):
        sums = b.add(sums, v.rotate_lanes(b, sums, distance))
    swapped = v.rotate_lanes(b, sums, 8)
    # meta = d * (1, both, first, second): lane 0 of d, then the sums.
    mix = b.shuffle_vector(b.add(sums, swapped), sums, ir.Constant(v.vector(v.I32, 4), [0, 0, 16, 24]))
    ones = ir.Constant(v.vector(v.I32, 4), [1, 0, 0, 0])
    keep = ir.Constant(v.vector(v.I32, 4), [0, -1, -1, -1])
    factors = b.sitofp(b.or_(b.and_(mix, keep), ones), v.vector(v.F32, 4))
    four = b.shuffle_vector(d, d, ir.Constant(v.vector(v.I32, 4), [0, 1, 2, 3]))
    v.store(b, b.fmul(four, factors), meta, 16)


def emit_write(b, low, high, plain, quants, meta):
    """Write 32 values as float32 to ``plain`` and as int8 to ``quants``; a zero address skips that form."""
    with b.if_then(b.icmp_signed("!=", plain, v.const(0))):
        v.store(b, low, plain, 4)
        v.store(b, high, v.at(b, plain, 64), 4)
    with b.if_then(b.icmp_signed("!=", quants, v.const(0))):
        emit_quantize(b, low, high, quants, meta)


def _pair(b, address):
    return v.load(b, address, v.VF, 4), v.load(b, v.at(b, address, 64), v.VF, 4)


@intrinsic
def sum_squares(context, address, count):
    """Sum of x*x over ``count`` floats (a multiple of 16), in 16 partial sums."""

    def generate(_, b, signature, args):
        total = cgutils.alloca_once_value(b, v.floats(0.0))
        with cgutils.for_range(b, b.sdiv(args[1], v.const(16))) as loop:
            x = v.load(b, b.add(args[0], b.mul(loop.index, v.const(64))), v.VF, 4)
            b.store(v.fma(b, x, x, b.load(total, typ=v.VF)), total)
        return v.reduce_add(b, b.load(total, typ=v.VF))

    return types.float32(types.int64, types.int64), generate


@intrinsic
def scale_block(context, x, weight, factor, plain, quants, meta):
    """32 values x * factor * weight to ``plain`` and/or ``quants`` + ``meta``."""

    def generate(ctx, b, signature, args):
        factor = v.splat(b, args[2])
        parts = [b.fmul(b.fmul(value, factor), w) for value, w in zip(_pair(b, args[0]), _pair(b, args[1]))]
        emit_write(b, *parts, *args[3:])
        return ctx.get_dummy_value()

    i = types.int64
    return types.void(i, i, types.float32, i, i, i), generate


@intrinsic
def add_scaled(context, x, y, weight, factor):
    """16 values: x += y * factor * weight."""

    def generate(ctx, b, signature, args):
        x, y, w = [v.load(b, address, v.VF, 4) for address in args[:3]]
        v.store(b, v.fma(b, b.fmul(y, v.splat(b, args[3])), w, x), args[0], 4)
        return ctx.get_dummy_value()

    i = types.int64
    return types.void(i, i, i, types.float32), generate


@intrinsic
def scale_vector(context, x, weight, factor):
    """16 values: x = x * factor * weight."""

    def generate(ctx, b, signature, args):
        x, w = (v.load(b, address, v.VF, 4) for address in args[:2])
        v.store(b, b.fmul(b.fmul(x, v.splat(b, args[2])), w), args[0], 4)
        return ctx.get_dummy_value()

    i = types.int64
    return types.void(i, i, types.float32), generate


def _silu(b, x):
    return b.fdiv(x, b.fadd(v.exp(b, b.fneg(x)), v.floats(1.0)))


def _gelu_tanh(b, x):
    cube = b.fmul(b.fmul(x, x), x)
    inner = b.fmul(v.floats(0.7978845608028654), v.fma(b, cube, v.floats(0.044715), x))
    return b.fmul(b.fmul(x, v.floats(0.5)), b.fadd(v.tanh(b, inner), v.floats(1.0)))


def _gelu(b, x):
    """x * Phi(x), the error function by Abramowitz and Stegun 7.1.26 (absolute error below 2e-7)."""
    z = v.call(b, "llvm.fabs.v16f32", v.VF, b.fmul(x, v.floats(0.7071067811865476)))
    t = b.fdiv(v.floats(1.0), v.fma(b, z, v.floats(0.3275911), v.floats(1.0)))
    poly = v.floats(1.061405429)
    for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        poly = v.fma(b, poly, t, v.floats(c))
    tail = b.fmul(b.fmul(poly, t), v.exp(b, b.fneg(b.fmul(z, z))))
    erf = v.call(b, "llvm.copysign.v16f32", v.VF, b.fsub(v.floats(1.0), tail), x)
    return b.fmul(b.fmul(x, v.floats(0.5)), b.fadd(erf, v.floats(1.0)))


def _gated(function):
    @intrinsic
    def gate_block(context, gate, up, plain, quants, meta):
        """32 values function(gate) * up to ``plain`` and/or ``quants`` + ``meta``."""

        def generate(ctx, b, signature, args):
            parts = [b.fmul(function(b, g), u) for g, u in zip(_pair(b, args[0]), _pair(b, args[1]))]
            emit_write(b, *parts, *args[2:])
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return gate_block


silu_block, gelu_tanh_block, gelu_block = _gated(_silu), _gated(_gelu_tanh), _gated(_gelu)


@intrinsic
def half_to_float(context, bits):
    """float16 bits as float32."""

    def generate(_, b, signature, args):
        wide = v.widen_half(b, v.splat(b, args[0]), HOST)
        return b.extract_element(wide, ir.Constant(v.I32, 0))

    return types.float32(types.uint16), generate


@register_jitable
def load_half(address):
    """The float16 at an address."""
    return half_to_float(mem.load_u16(address))


@register_jitable
def quant_at(block, row, k, bits):
    """Weight k of a row in a block of 32, as stored (unsigned)."""
    if bits == 8:
        return np_int(mem.load_u8(block + k // 4 * 64 + row * 4 + k % 4))
    lane = row * 4 + k % 4
    if bits < 4:
        value = np_int(mem.load_u8(block + k // 16 * 64 + lane)) >> (2 * (k % 16 // 4)) & 3
        if bits == 3:
            value |= (np_int(mem.load_u8(block + 128 + k // 4 * 8 + lane // 8)) >> (lane % 8) & 1) << 2
        return value
    value = np_int(mem.load_u8(block + k % 16 // 4 * 64 + lane)) >> (4 * (k // 16)) & 15
    if bits == 5:
        value |= (np_int(mem.load_u8(block + 256 + k // 4 * 8 + lane // 8)) >> (lane % 8) & 1) << 4
    if bits == 6:
        value |= (np_int(mem.load_u8(block + 256 + k // 16 * 64 + lane)) >> (2 * (k % 16 // 4)) & 3) << 4
    return value


@register_jitable
def np_int(x):
    """Widen a byte to int64, so that shifts do not lose bits."""
    return types.int64(x)


@register_jitable
def signed_at(address):
    """A signed byte."""
    byte = np_int(mem.load_u8(address))
    return byte - 256 * (byte >> 7)


@register_jitable
def factors_at(scales, block, row, half, code):
    """(scale, minimum) of a row's weights in one half of a block of 32; see ``formats``."""
    inside, zero = block % 8, types.float32(0)
    if code in (0, 2, 4, 8, 12):
        return load_half(scales + block * 32 + row * 2), zero
    if code in (1, 3):
        return load_half(scales + block * 64 + row * 2), load_half(scales + block * 64 + 32 + row * 2)
    if code in (7, 11):
        group = scales + block // 8 * 288 + row
        return load_half(group + row) * types.float32(signed_at(group + 32 + (inside * 2 + half) * 16)), zero
    if code == 13:
        group = scales + block // 8 * 160 + row
        return load_half(group + row) * types.float32(signed_at(group + 32 + inside * 16)), zero
    group = scales + block // 8 * (576 if code == 10 else 320) + row
    scale, low = group + 64 + inside * 32, group + 80 + inside * 32
    if code == 10:
        scale, low = scale + half * 16, scale + half * 16 + 256
    outer, least = load_half(group + row), load_half(group + row + 32)
    return outer * types.float32(mem.load_u8(scale)), -least * types.float32(mem.load_u8(low))


@register_jitable
def unpack_row(weights, scales, lower, row, size, code, out):
    """Row ``row`` (0..15) of a panel as ``size`` float32 at ``out``; ``code`` as in ``formats``."""
    if code >= 16:
        for k in range(size):
            if code == 16:
                mem.store_f32(out + 4 * k, mem.load_f32(weights + (k * 16 + row) * 4))
            elif code == 17:
                mem.store_f32(out + 4 * k, load_half(weights + (k * 16 + row) * 2))
            else:
                word = types.uint32(mem.load_u16(weights + (k // 2 * 32 + row * 2 + k % 2) * 2))
                mem.store_f32(out + 4 * k, mem.bits_float(types.uint32(word << 16)))
        return
    bits, zero = BITS[code], ZEROS[code]
    for block in range(size // 32):
        address = weights + block * 64 * bits
        for k in range(32):
            scale, low = factors_at(scales, block, row, k // 16, code)
            stored = quant_at(address, row, k, bits)
            if code == 8:
                pair = mem.load_u8(lower + block * 128 + k // 16 * 64 + row * 4 + k % 4)
                stored = stored << 2 | np_int(pair) >> (2 * (k % 16 // 4)) & 3
            if code in (12, 13):
                stored = np_int(IQ4[stored])
            mem.store_f32(out + 4 * (block * 32 + k), scale * types.float32(stored - zero) + low)


@register_jitable
def address_of(args, index):
    """Entry ``index`` of an argument table."""
    return mem.load_i64(args + 8 * index)


@register_jitable
def float_of(args, index):
    """Entry ``index`` of an argument table, a float32 by its bits."""
    return mem.bits_float(types.uint32(mem.load_i64(args + 8 * index)))


def embed(args, thread, threads):
    """x[m] = scale * row token_ids[m]. args: count, token ids, weights, scales, panel bytes, scale bytes, code, size,
    x, scale, lower plane, its panel bytes."""
    tokens = mem.load_i64(address_of(args, 0))
    ids, size, out = address_of(args, 1), address_of(args, 7), address_of(args, 8)
    factor = float_of(args, 9)
    for m in range(tokens * thread // threads, tokens * (thread + 1) // threads):
        token = mem.load_i64(ids + 8 * m)
        weights = address_of(args, 2) + token // 16 * address_of(args, 4)
        scales = address_of(args, 3) + token // 16 * address_of(args, 5)
        lower = address_of(args, 10) + token // 16 * address_of(args, 11)
        target = out + m * size * 4
        unpack_row(weights, scales, lower, token % 16, size, address_of(args, 6), target)
        if factor != types.float32(1):
            for k in range(size):
                mem.store_f32(target + 4 * k, mem.load_f32(target + 4 * k) * factor)


def norm(args, thread, threads):
    """RMSNorm of rows, by blocks of 32 so that one token keeps all threads busy.

    args: count, x, row table (0 = rows in order), weight (0 = quantize only), size, eps, plain, quants, meta. Each thread
    sums its rows' squares itself, which is cheaper than waiting for another.
    """
    tokens = mem.load_i64(address_of(args, 0))
    x, table, weight, size = (
        address_of(args, 1),
        address_of(args, 2),
        address_of(args, 3),
        address_of(args, 4),
    )
    eps, plain = float_of(args, 5), address_of(args, 6)
    quants, meta = address_of(args, 7), address_of(args, 8)
    blocks = size // 32
    item, last = tokens * blocks * thread // threads, tokens * blocks * (thread + 1) // threads
    m = item // blocks
    while item < last:
        row = m if table == 0 else mem.load_i64(table + 8 * m)
        source = x + row * size * 4
        mean = sum_squares(source, size) / types.float32(size)
        factor = types.float32(1) / types.float32((mean + eps) ** types.float32(0.5))
        m += 1
        stop = min(last, m * blocks)
        at = source - (m - 1) * blocks * 128
        for i in range(item, stop):
            scale_block(
                at + i * 128,
                weight + (at - source) + i * 128,
                factor,
                0 if plain == 0 else plain + i * 128,
                0 if quants == 0 else quants + i * 32,
                meta + i * 16,
            )
        item = stop


def add_norm(args, thread, threads):
    """x += alpha * RMSNorm(y) (norms behind attention and MLP). args: count, y, weight, size, eps, alpha, x."""
    tokens = mem.load_i64(address_of(args, 0))
    y, weight, size = address_of(args, 1), address_of(args, 2), address_of(args, 3)
    eps, alpha, x = float_of(args, 4), float_of(args, 5), address_of(args, 6)
    for m in range(tokens * thread // threads, tokens * (thread + 1) // threads):
        source, target = y + m * size * 4, x + m * size * 4
        mean = sum_squares(source, size) / types.float32(size)
        factor = alpha / types.float32((mean + eps) ** types.float32(0.5))
        for k in range(size // 16):
            add_scaled(target + k * 64, source + k * 64, weight + k * 64, factor)


def gate(args, thread, threads):
    """act(gate) * up. args: count, gate_up, size (of one half), activation, plain, quants, meta."""
    tokens = mem.load_i64(address_of(args, 0))
    source, size, kind = address_of(args, 1), address_of(args, 2), address_of(args, 3)
    plain, quants, meta = address_of(args, 4), address_of(args, 5), address_of(args, 6)
    blocks = size // 32
    item, last = tokens * blocks * thread // threads, tokens * blocks * (thread + 1) // threads
    m = item // blocks
    while item < last:
        # Row m's gates begin at block 2 m: half of each row of the source are the ups.
        gates = source + m * blocks * 128
        m += 1
        stop = min(last, m * blocks)
        for i in range(item, stop):
            g = gates + i * 128
            out = 0 if plain == 0 else plain + i * 128
            small = 0 if quants == 0 else quants + i * 32
            if kind == 0:
                silu_block(g, g + size * 4, out, small, meta + i * 16)
            elif kind == 1:
                gelu_tanh_block(g, g + size * 4, out, small, meta + i * 16)
            else:
                gelu_block(g, g + size * 4, out, small, meta + i * 16)
        item = stop
