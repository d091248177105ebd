"""Scalars, atomics and calls by address: what compiled kernels need and Numba does not give them.

Kernels receive one table of int64 (``args``); addresses of arrays and sizes are its entries. One signature then serves
every kernel, so each is compiled once and cached.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from octavo.device.kernels.numba import vector as v


def _loader(kind, result):
    @intrinsic
    def load(context, address):
        """The value at an address."""

        def generate(_, b, signature, args):
            return v.load(b, args[0], kind)

        return result(types.int64), generate

    return load


def _storer(kind, value):
    @intrinsic
    def store(context, address, x):
        """Write a value at an address."""

        def generate(ctx, b, signature, args):
            v.store(b, args[1], args[0])
            return ctx.get_dummy_value()

        return types.void(types.int64, value), generate

    return store


load_i64 = _loader(v.I64, types.int64)
load_i32 = _loader(v.I32, types.int32)
load_u16 = _loader(v.I16, types.uint16)
load_u8 = _loader(v.I8, types.uint8)
load_f32 = _loader(v.F32, types.float32)
store_i64 = _storer(v.I64, types.int64)
store_i32 = _storer(v.I32, types.int32)
store_u32 = _storer(v.I32, types.uint32)
store_u16 = _storer(v.I16, types.uint16)
store_u8 = _storer(v.I8, types.uint8)
store_f32 = _storer(v.F32, types.float32)


@intrinsic
def float_bits(context, x):
    """The bits of a float32."""

    def generate(_, b, signature, args):
        return b.bitcast(args[0], v.I32)

    return types.uint32(types.float32), generate


@intrinsic
def bits_float(context, x):
    """The float32 with these bits."""

    def generate(_, b, signature, args):
        return b.bitcast(args[0], v.F32)

    return types.float32(types.uint32), generate


@intrinsic
def atomic_add(context, address, amount):
    """Add to an int64 in memory; returns the value before."""

    def generate(_, b, signature, args):
        return b.atomic_rmw("add", b.inttoptr(args[0], v.POINTER), args[1], "acq_rel")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def atomic_load(context, address):
    """Read an int64 that another thread writes; later reads see what it wrote before."""

    def generate(_, b, signature, args):
        return b.load_atomic(b.inttoptr(args[0], v.POINTER), "acquire", 8, typ=v.I64)

    return types.int64(types.int64), generate


@intrinsic
def atomic_store(context, address, value):
    """Write an int64 after everything written before."""

    def generate(ctx, b, signature, args):
        b.store_atomic(args[1], b.inttoptr(args[0], v.I64.as_pointer()), "seq_cst", 8)
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def pause(context):
    """Tell the processor that this is a waiting loop."""

    def generate(ctx, b, signature, args):
        triple = b.module.triple
        if triple.startswith(("x86", "i686")):
            v.call(b, "llvm.x86.sse2.pause", ir.VoidType())
        elif triple.startswith(("aarch64", "arm64")):
            v.call(b, "llvm.aarch64.hint", ir.VoidType(), ir.Constant(v.I32, 1))
        return ctx.get_dummy_value()

    return types.void(), generate


@intrinsic
def ticks(context):
    """A counter of constant rate: the time stamp counter, or the virtual timer of ARM processors."""

    def generate(_, b, signature, args):
        arm = b.module.triple.startswith(("aarch64", "arm64"))
        return v.call(b, "llvm.readsteadycounter" if arm else "llvm.readcyclecounter", v.I64)

    return types.int64(), generate


@intrinsic
def call_kernel(context, function, args, thread, threads):
    """Call the compiled kernel at an address: void(int64 args, int64 thread, int64 threads)."""

    def generate(ctx, b, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [v.I64, v.I64, v.I64])
        b.call(_function(b, args[0], kind), list(args[1:]))
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def call_system(context, function, a, b_, c, d, e):
    """Call a C function of five integers by address (``syscall``, ``sched_yield``); returns its result."""

    def generate(ctx, b, signature, args):
        kind = ir.FunctionType(v.I64, [v.I64] * 5)
        return b.call(_function(b, args[0], kind), list(args[1:]))

    return types.int64(*[types.int64] * 6), generate


def _function(b, address, kind):
    """A typed callee from an address: an opaque pointer carries no function type, a typed one does."""
    return b.inttoptr(address, kind.as_pointer())
