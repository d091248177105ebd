"""The Gumbel-max draw over a vocabulary: argmax(logit / temperature + noise), noise = a hash of (seed, position, token).

The function is that of ``device.ops.sampling``; logarithms here are polynomials, so noise agrees to a few units in the
last place.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from octavo.device.kernels.numba import memory as mem
from octavo.device.kernels.numba import vector as v
from octavo.device.kernels.numba.rows import address_of
from octavo.device.kernels.numba.shared import DRAW_SEGMENT as SEGMENT
from octavo.device.kernels.numba.shared import (
    FIRST_WORD,
    LEAST,
    MIX_A,
    MIX_B,
    ROW_FIELDS,
    SECOND_WORD,
    TEMPERATURE,
    WEYL,
)


def signed(word):
    """The int32 constant with the bits of a word."""
    return word - (1 << 32) if word >= 1 << 31 else word


def mix(b, x):
    """Wellons' 32-bit mixer on 16 lanes."""
    x = b.mul(b.xor(x, b.lshr(x, v.ints(16))), v.ints(signed(MIX_A)))
    x = b.mul(b.xor(x, b.lshr(x, v.ints(15))), v.ints(signed(MIX_B)))
    return b.xor(x, b.lshr(x, v.ints(16)))


def gumbel(b, ids, first, second):
    """Noise for 16 token ids; ``first`` and ``second`` are the words of seed and position in all lanes."""
    bits = mix(b, b.add(mix(b, b.xor(b.mul(ids, v.ints(signed(WEYL))), first)), second))
    uniform = b.fmul(b.fadd(b.uitofp(bits, v.VF), v.floats(0.5)), v.floats(2.0**-32))
    # -log(1 - u), by its series where 1 - u would round: the winner of the draw has a small u.
    series = v.fma(b, uniform, v.floats(0.33333334), v.floats(0.5))
    series = b.fmul(uniform, v.fma(b, uniform, series, v.floats(1.0)))
    rest = v.maximum(b, b.fsub(v.floats(1.0), uniform), v.floats(3e-8))
    small = b.fcmp_ordered("<", uniform, v.floats(0.004))
    return b.fneg(v.log(b, b.select(small, series, b.fneg(v.log(b, rest)))))


@intrinsic
def best_of(context, row, first, last, score):
    """Best token of first..last-1 (multiples of 16) of a row; writes its score (float32) and returns its id."""

    def generate(_, b, signature, args):
        row, first, last, score = args
        logits = v.load(b, row, v.I64, 8)
        temperature, least = (v.load_splat(b, v.at(b, row, 8 * i)) for i in (TEMPERATURE, LEAST))
        words = [v.load_splat(b, v.at(b, row, 8 * i), v.I32) for i in (FIRST_WORD, SECOND_WORD)]
        lanes = ir.Constant(v.VI, list(range(16)))
        best = cgutils.alloca_once_value(b, v.floats(-np.inf))
        where = cgutils.alloca_once_value(b, v.ints(0))
        with cgutils.for_range_slice(b, first, last, v.const(16)) as (at, _):
            ids = b.add(v.splat(b, b.trunc(at, v.I32)), lanes)
            z = b.fdiv(v.load(b, b.add(logits, b.mul(at, v.const(4))), v.VF, 4), temperature)
            total = b.fadd(z, gumbel(b, ids, *words))
            total = b.select(b.fcmp_ordered(">=", z, least), total, v.floats(-np.inf))
            better = b.fcmp_ordered(">", total, b.load(best, typ=v.VF))
            b.store(b.select(better, total, b.load(best, typ=v.VF)), best)
            b.store(b.select(better, ids, b.load(where, typ=v.VI)), where)
        top = v.reduce_max(b, b.load(best, typ=v.VF))
        v.store(b, top, score, 4)
        # The lowest id among equals.
        equal = b.fcmp_ordered("==", b.load(best, typ=v.VF), v.splat(b, top))
        ids = b.select(equal, b.load(where, typ=v.VI), v.ints(0x7FFFFFFF))
        for distance in (8, 4, 2, 1):
            other = v.rotate_lanes(b, ids, distance)
            ids = b.select(b.icmp_signed("<", ids, other), ids, other)
        return b.sext(b.extract_element(ids, ir.Constant(v.I32, 0)), v.I64)

    return types.int64(*[types.int64] * 4), generate


def draw(args, thread, threads):
    """args: rows, row table [rows, ROW_FIELDS], padded vocabulary (entries past the end are -inf), scores and ids
    [rows, segments], segments."""
    rows, table, size = address_of(args, 0), address_of(args, 1), address_of(args, 2)
    scores, ids, segments = address_of(args, 3), address_of(args, 4), address_of(args, 5)
    for item in range(rows * segments * thread // threads, rows * segments * (thread + 1) // threads):
        first = item % segments * SEGMENT
        row = table + item // segments * ROW_FIELDS * 8
        mem.store_i64(ids + 8 * item, best_of(row, first, min(size, first + SEGMENT), scores + 4 * item))
