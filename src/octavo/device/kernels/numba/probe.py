"""Ceilings of this machine, by the instructions the kernels use: reading memory in order, and 8-bit products in registers."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from octavo.device.kernels.numba import vector as v
from octavo.device.kernels.numba.rows import address_of
from octavo.device.kernels.numba.shared import HOST

CHAINS = 8  # independent sums: enough to hide the latency of a product
LINES = 16  # of 64 bytes, read at a time
AHEAD = 64  # lines between fetching and reading
PRODUCTS = 64 * CHAINS  # multiplications a round


@intrinsic
def read_range(context, first, last, out):
    """Read memory from ``first`` to ``last`` (multiples of 1 KiB apart) and store what keeps the loads alive."""

    def generate(ctx, b, signature, args):
        first, last, out = args
        kind = v.vector(v.I64, 8)
        sums = [cgutils.alloca_once_value(b, ir.Constant(kind, [0] * 8)) for _ in range(4)]
        with cgutils.for_range_slice(b, first, last, v.const(64 * LINES)) as (at, _):
            for line in range(LINES):
                v.prefetch(b, v.at(b, at, 64 * (line + AHEAD)))
                slot = sums[line % 4]
                b.store(b.xor(b.load(slot, typ=kind), v.load(b, v.at(b, at, 64 * line), kind, 64)), slot)
        total = b.load(sums[0], typ=kind)
        for slot in sums[1:]:
            total = b.xor(total, b.load(slot, typ=kind))
        v.store(b, total, out, 8)
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def multiply_rounds(context, rounds, out):
    """``rounds`` times CHAINS vector products of 64 pairs of bytes."""

    def generate(ctx, b, signature, args):
        rounds, out = args
        # Different starts: of equal chains the compiler would keep one.
        sums = [cgutils.alloca_once_value(b, v.ints(i)) for i in range(CHAINS)]
        weights = v.load(b, out, v.VBYTES, 1)
        tokens = v.load(b, v.at(b, out, 64), v.VBYTES, 1)
        with cgutils.for_range(b, rounds):
            for slot in sums:
                b.store(v.dot_bytes(b, HOST, b.load(slot, typ=v.VI), weights, tokens, 4), slot)
        for slot in sums:
            v.store(b, b.load(slot, typ=v.VI), out, 4)
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def probe_read(args, thread, threads):
    """args: address (on a cache line), KiB, scratch (64 bytes a thread)."""
    first, size = address_of(args, 0), address_of(args, 1)
    start, stop = size * thread // threads, size * (thread + 1) // threads
    read_range(first + start * 1024, first + stop * 1024, address_of(args, 2) + 64 * thread)


def probe_dot(args, thread, threads):
    """args: rounds, scratch (128 bytes a thread)."""
    multiply_rounds(address_of(args, 0), address_of(args, 1) + 128 * thread)
