"""The likeliest tokens without reading the whole output matrix: exact logits of every token that can be among them.

``scan`` reads the upper six bits of a split matrix (see ``formats``), three quarters of it, and gives each token the
largest logit that its lower bits allow; ``refine`` computes the tokens that reach a threshold, from all bits and by the very
tile of the full product, and gives the others -inf. The lower bits of a weight differ by at most 1.5 steps from the middle
that the scan takes for them, so

    | logit - estimate |  <=  1.5 x sum over blocks of  weight scale x token scale x sum |token|        (L1 bound)

plus what float32 sums may lose, which SLACK covers: a sum of n rounded terms errs by n 2^-24 times the sum of their
magnitudes, here less than 3e-5 of the bound for each block of 32 and each of the two passes.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from octavo.device.kernels.numba import formats, linear
from octavo.device.kernels.numba import memory as mem
from octavo.device.kernels.numba import vector as v
from octavo.device.kernels.numba.rows import address_of
from octavo.device.kernels.numba.shared import HOST, META_BYTES, MOST_ROWS
from octavo.device.kernels.numba.shared import SCAN_SEGMENT as SEGMENT

# Entries behind those of ``linear``: [threads, tokens, blocks] floats; [tokens, segments, 16] floats; tokens of the
# vocabulary; [tokens] floats.
SPREADS, LOWS, VALID, LEASTS, ENTRIES = range(14, 19)
SLACK = 2e-4  # of the bound, for each block


def _bounded_tile(b, target, count, a, panel):
    """Estimates / 4 and bounds of one panel for ``count`` tokens: two lists of <16 x float>."""
    form = formats.UPPER6
    sums, bounds = ([cgutils.alloca_once(b, v.VF) for _ in range(count)] for _ in range(2))
    for slot in sums + bounds:
        b.store(v.floats(0.0), slot)
    strides = (b.mul(a["blocks"], v.const(32)), b.mul(a["blocks"], v.const(META_BYTES)))
    with cgutils.for_range(b, a["blocks"]) as loop:
        index = loop.index
        linear.prefetch_block(b, panel["weights"], index, form.block_bytes, False)
        weights = linear.unpack_block(
            b, form, b.add(panel["weights"], b.mul(index, v.const(form.block_bytes)))
        )
        scale_at = b.add(panel["scales"], b.mul(index, v.const(form.group_bytes)))
        scales = linear.block_scales(b, target, form, scale_at, [], None)
        quants = b.add(panel["quants"], b.mul(index, v.const(32)))
        meta = b.add(panel["meta"], b.mul(index, v.const(META_BYTES)))
        linear.block_tokens(b, target, form, weights, scales, quants, meta, strides, sums)
        size = v.call(b, "llvm.fabs.v16f32", v.VF, scales[0])
        for m, slot in enumerate(bounds):
            at = b.add(panel["spreads"], b.mul(b.add(index, b.mul(a["blocks"], v.const(m))), v.const(4)))
            b.store(v.fma(b, size, v.load_splat(b, at), b.load(slot, typ=v.VF)), slot)
    return [[b.load(slot, typ=v.VF) for slot in slots] for slots in (sums, bounds)]


def emit_scan(b, target, values, segment, spreads):
    """One segment of panels for all tokens: upper bounds to OUT, the lanes' largest lower bounds to LOWS."""
    a = {"blocks": values[linear.BLOCKS]}
    tokens = v.load(b, values[linear.COUNT], v.I64, 8)
    segments = b.sdiv(b.add(values[linear.PANELS], v.const(SEGMENT - 1)), v.const(SEGMENT))
    first = b.mul(segment, v.const(SEGMENT))
    end = b.add(first, v.const(SEGMENT))
    end = b.select(b.icmp_signed("<", end, values[linear.PANELS]), end, values[linear.PANELS])
    lanes = ir.Constant(v.VI, list(range(16)))

    def low_at(m):
        return b.add(values[LOWS], b.mul(b.add(b.mul(m, segments), segment), v.const(64)))

    with cgutils.for_range(b, tokens) as loop:
        v.store(b, v.floats(-np.inf), low_at(loop.index), 4)
    with cgutils.for_range_slice(b, first, end, v.const(1)) as (p, _):
        planes = linear.panel_planes(b, formats.UPPER6, values, a["blocks"], p)
        scale_bytes = b.mul(a["blocks"], v.const(formats.UPPER6.group_bytes))
        left = b.trunc(b.sub(values[VALID], b.mul(p, v.const(16))), v.I32)
        real = b.icmp_signed("<", lanes, v.splat(b, left))

        def tile(size, m, _):
            panel = {
                "weights": planes[0],
                "scales": b.add(values[linear.SCALES], b.mul(p, scale_bytes)),
                "quants": b.add(values[linear.QUANTS], b.mul(m, b.mul(a["blocks"], v.const(32)))),
                "meta": b.add(values[linear.META], b.mul(m, b.mul(a["blocks"], v.const(META_BYTES)))),
                "spreads": b.add(spreads, b.mul(m, b.mul(a["blocks"], v.const(4)))),
            }
            sums, bounds = _bounded_tile(b, target, size, a, panel)
            for i in range(size):
                at = b.add(m, v.const(i))
                out = b.add(values[linear.OUT], b.mul(at, values[linear.OUT_BYTES]))
                upper = v.fma(b, sums[i], v.floats(4), bounds[i])
                v.store(b, upper, b.add(out, b.mul(p, v.const(64))), 4)
                low = v.fma(b, sums[i], v.floats(4), b.fneg(bounds[i]))
                low = b.select(real, low, v.floats(-np.inf))
                v.store(b, v.maximum(b, low, v.load(b, low_at(at), v.VF, 4)), low_at(at), 4)

        linear.over_tiles(b, [size for size in target.tiles if size <= MOST_ROWS], tokens, tile)


def emit_refine(b, target, values, p):
    """One panel for all tokens: exact logits where any lane reaches its token's threshold (or is NaN), else -inf."""
    a = {
        "blocks": values[linear.BLOCKS],
        "out_bytes": values[linear.OUT_BYTES],
        "alpha": b.bitcast(b.trunc(values[linear.ALPHA], v.I32), v.F32),
        "add": ir.Constant(ir.IntType(1), 0),
    }
    form, tokens = formats.SPLIT8, v.load(b, values[linear.COUNT], v.I64, 8)
    planes = linear.panel_planes(b, form, values, a["blocks"], p)
    scale_bytes = b.mul(a["blocks"], v.const(form.group_bytes))
    with cgutils.for_range(b, tokens) as loop:
        m = loop.index
        out = b.add(values[linear.OUT], b.add(b.mul(m, a["out_bytes"]), b.mul(p, v.const(64))))
        least = v.load_splat(b, b.add(values[LEASTS], b.mul(m, v.const(4))))
        reaches = b.fcmp_unordered(">=", v.load(b, out, v.VF, 4), least)
        bits = b.bitcast(reaches, ir.IntType(16))
        with b.if_else(b.icmp_signed("!=", bits, ir.Constant(ir.IntType(16), 0))) as (some, none):
            with some:
                panel = {
                    "planes": planes,
                    "scales": b.add(values[linear.SCALES], b.mul(p, scale_bytes)),
                    "quants": b.add(values[linear.QUANTS], b.mul(m, b.mul(a["blocks"], v.const(32)))),
                    "meta": b.add(values[linear.META], b.mul(m, b.mul(a["blocks"], v.const(META_BYTES)))),
                }
                sums = linear.quantized_tile(b, target, form, 1, a, panel, False)
                linear.write_tile(b, sums, a, out, values[linear.BIAS])
            with none:
                v.store(b, v.floats(-np.inf), out, 4)


@intrinsic
def scan_segment(context, args, segment, spreads):
    """See ``emit_scan``."""

    def generate(ctx, b, signature, values):
        emit_scan(b, HOST, linear.load_args(b, values[0], ENTRIES), values[1], values[2])
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def refine_panel(context, args, panel):
    """See ``emit_refine``."""

    def generate(ctx, b, signature, values):
        emit_refine(b, HOST, linear.load_args(b, values[0], ENTRIES), values[1])
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def scan(args, thread, threads):
    """args: as ``linear``, then spreads, lows, vocabulary, leasts."""
    tokens, blocks = mem.load_i64(address_of(args, linear.COUNT)), address_of(args, linear.BLOCKS)
    quants, meta = address_of(args, linear.QUANTS), address_of(args, linear.META)
    spreads = address_of(args, SPREADS) + thread * MOST_ROWS * blocks * 4
    most = types.float32(1.5 * (1 + SLACK * blocks))
    for i in range(tokens * blocks):
        total = 0
        for k in range(32):
            q = types.int64(mem.load_u8(quants + 32 * i + k))
            total += q if q < 128 else 256 - q
        d = mem.load_f32(meta + META_BYTES * i)
        mem.store_f32(spreads + 4 * i, most * d * types.float32(total))
    segments = (address_of(args, linear.PANELS) + SEGMENT - 1) // SEGMENT
    for segment in range(segments * thread // threads, segments * (thread + 1) // threads):
        scan_segment(args, segment, spreads)


def refine(args, thread, threads):
    """args: as ``scan``. Panels are dealt out in turns: likely tokens lie together."""
    for panel in range(thread, address_of(args, linear.PANELS), threads):
        refine_panel(args, panel)
