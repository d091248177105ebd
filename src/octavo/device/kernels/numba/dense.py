"""out[m, n] = alpha * sum_k x[m, k] w[n, k] + bias[n] (+ out[m, n]) for plain weights: float32 tokens, no rounding.

Same argument table as ``linear``; TOKENS is the address of float32 rows of TOKEN_BYTES each, BLOCKS counts 32 inputs.
"""

from __future__ import annotations

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from octavo.device.kernels.numba import vector as v
from octavo.device.kernels.numba.linear import TOKEN_BYTES, TOKENS, load_args, over_tiles, share, write_tile
from octavo.device.kernels.numba.shared import (
    ADD,
    ALPHA,
    BIAS,
    BIAS_BYTES,
    BLOCKS,
    COUNT,
    HOST,
    OUT,
    OUT_BYTES,
    PANELS,
    WEIGHTS,
)


def _weights(b, target, dtype, address):
    """Weights of two consecutive inputs as two <16 x float>; ``address`` of the first."""
    if dtype == "F32":
        return [v.load(b, v.at(b, address, 64 * i), v.VF, 4) for i in range(2)]
    if dtype == "F16":
        return [
            v.widen_half(b, v.load(b, v.at(b, address, 32 * i), v.vector(v.I16), 2), target) for i in range(2)
        ]
    pair = v.load(b, address, v.VI, 4)
    high = b.and_(pair, v.ints(0xFFFF0000 - (1 << 32)))
    return [b.bitcast(b.shl(pair, v.ints(16)), v.VF), b.bitcast(high, v.VF)]


def _tile(b, target, dtype, count, inputs, weights, tokens, token_bytes):
    """Sums of one panel over ``count`` tokens; two partial sums a token hide latency.

    Their number must not depend on ``count``: a token's result is the same in every batch, to the last bit.
    """
    chains = 2
    sums = [[cgutils.alloca_once(b, v.VF) for _ in range(chains)] for _ in range(count)]
    for slot in (slot for row in sums for slot in row):
        b.store(v.floats(0.0), slot)
    step = 8
    item = 64 if dtype == "F32" else 32
    with cgutils.for_range(b, b.sdiv(inputs, v.const(step))) as loop:
        at = b.mul(loop.index, v.const(step))
        for pair in range(step // 2):
            address = b.add(weights, b.mul(b.add(at, v.const(2 * pair)), v.const(item)))
            for half, w in enumerate(_weights(b, target, dtype, address)):
                for m in range(count):
                    slot = sums[m][(2 * pair + half) % chains]
                    x = b.add(tokens, b.add(b.mul(token_bytes, v.const(m)), b.mul(at, v.const(4))))
                    spread = v.load_splat(b, v.at(b, x, 4 * (2 * pair + half)))
                    b.store(v.fma(b, w, spread, b.load(slot, typ=v.VF)), slot)
    out = []
    for row in sums:
        total = b.load(row[0], typ=v.VF)
        for slot in row[1:]:
            total = b.fadd(total, b.load(slot, typ=v.VF))
        out.append(total)
    return out


def dense(dtype, target):
    """The kernel of one plain weight type as an intrinsic (args, thread, threads)."""

    def emit(b, values, thread, threads):
        a = {
            "out_bytes": values[OUT_BYTES],
            "alpha": b.bitcast(b.trunc(values[ALPHA], v.I32), v.F32),
            "add": b.icmp_signed("!=", values[ADD], v.const(0)),
        }
        inputs = b.mul(values[BLOCKS], v.const(32))
        tokens = v.load(b, values[COUNT], v.I64, 8)
        panel_bytes = b.mul(inputs, v.const(64 if dtype == "F32" else 32))
        first, last = share(b, values[PANELS], thread, threads)
        with cgutils.for_range_slice(b, first, last, v.const(1)) as (p, _):
            weights = b.add(values[WEIGHTS], b.mul(p, panel_bytes))
            bias = b.add(values[BIAS], b.mul(p, values[BIAS_BYTES]))

            def tile(size, m, first):
                rows = b.add(values[TOKENS], b.mul(m, values[TOKEN_BYTES]))
                sums = _tile(b, target, dtype, size, inputs, weights, rows, values[TOKEN_BYTES])
                out = b.add(b.add(values[OUT], b.mul(p, v.const(64))), b.mul(m, a["out_bytes"]))
                write_tile(b, sums, a, out, bias)

            over_tiles(b, target.tiles, tokens, tile)

    @intrinsic
    def linear(context, args, thread, threads):
        def generate(ctx, b, signature, values):
            emit(b, load_args(b, values[0], 13), values[1], values[2])
            return ctx.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), generate

    return linear


F32, F16, BF16 = dense("F32", HOST), dense("F16", HOST), dense("BF16", HOST)


def dense_f32(args, thread, threads):
    """float32 panels."""
    F32(args, thread, threads)


def dense_f16(args, thread, threads):
    """float16 panels."""
    F16(args, thread, threads)


def dense_bf16(args, thread, threads):
    """bfloat16 panels."""
    BF16(args, thread, threads)
