"""Small words for writing LLVM vectors of 16 lanes: the alphabet of the inner tiles.

Everything takes the IR builder first. Addresses are int64 values; ``at`` adds a constant byte offset.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from octavo.device.kernels.numba.target import Target

I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F16, F32 = ir.HalfType(), ir.FloatType()
POINTER = ir.PointerType()
LANES = 16


def vector(kind, lanes=LANES):
    """The vector type of ``lanes`` values."""
    return ir.VectorType(kind, lanes)


VF, VI = vector(F32), vector(I32)
VBYTES = vector(I8, 64)


def const(value):
    """An int64 constant."""
    return ir.Constant(I64, value)


def floats(value):
    """16 equal float32 lanes."""
    return ir.Constant(VF, [float(np.float32(value))] * LANES)


def ints(value, kind=VI):
    """Equal integer lanes of a vector type."""
    return ir.Constant(kind, [value] * kind.count)


def at(b, address, offset):
    """address + offset; offset is a Python int or an int64 value."""
    if isinstance(offset, int):
        return address if offset == 0 else b.add(address, const(offset))
    return b.add(address, offset)


def load(b, address, kind, align=1):
    """Load a value of LLVM type ``kind``."""
    value = b.load(b.inttoptr(address, POINTER), typ=kind)
    value.align = align
    return value


def store(b, value, address, align=1):
    """Store a value."""
    b.store(value, b.inttoptr(address, POINTER)).align = align


def splat(b, value, lanes=LANES):
    """All lanes equal to a scalar."""
    kind = vector(value.type, lanes)
    one = b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ints(0, vector(I32, lanes)))


def load_splat(b, address, kind=F32, align=4):
    """A scalar of memory in all lanes."""
    return splat(b, load(b, address, kind, align))


def call(b, name, result, *arguments, fastmath=()):
    """Call an LLVM intrinsic by name."""
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(result, [x.type for x in arguments]), name)
    return b.call(function, list(arguments), fastmath=fastmath)


def prefetch(b, address, near=False):
    """Start to bring a cache line in for reading: as far as the second level, which can wait for more lines at once, or
    where ``near`` into the first."""
    name, kinds = "llvm.prefetch.p0", [POINTER, I32, I32, I32]
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(ir.VoidType(), kinds), name)
    read, level, data = 0, 3 if near else 2, 1
    b.call(function, [b.inttoptr(address, POINTER)] + [ir.Constant(I32, x) for x in (read, level, data)])


def fma(b, x, y, z):
    """x * y + z, rounded once."""
    return call(b, "llvm.fma.v16f32", VF, x, y, z)


def maximum(b, x, y):
    """Lane-wise x > y ? x : y (one instruction; y where x is NaN)."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def minimum(b, x, y):
    """Lane-wise x < y ? x : y (y where x is NaN)."""
    return b.select(b.fcmp_ordered("<", x, y), x, y)


def rotate_lanes(b, x, distance, group=LANES):
    """Lane i of the result is lane i ^ distance (within aligned groups the order of a butterfly)."""
    mask = ir.Constant(vector(I32), [i ^ distance for i in range(group)])
    return b.shuffle_vector(x, x, mask)


def reduce_add(b, x):
    """Sum of 16 float lanes, in tree order."""
    for distance in (8, 4, 2, 1):
        x = b.fadd(x, rotate_lanes(b, x, distance))
    return b.extract_element(x, ir.Constant(I32, 0))


def reduce_max(b, x):
    """Largest of 16 float lanes (no NaN among them)."""
    for distance in (8, 4, 2, 1):
        x = maximum(b, x, rotate_lanes(b, x, distance))
    return b.extract_element(x, ir.Constant(I32, 0))


def exp(b, x):
    """e^x for 16 lanes, relative error below 2e-7; results below e^-87 flush to e^-87 (Cephes' polynomial)."""
    x = minimum(b, maximum(b, x, floats(-87.0)), floats(88.0))
    whole = call(b, "llvm.rint.v16f32", VF, b.fmul(x, floats(1.4426950408889634)))
    part = fma(b, whole, floats(-0.693359375), x)
    part = fma(b, whole, floats(2.12194440e-4), part)
    power = floats(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        power = fma(b, power, part, floats(c))
    power = b.fadd(fma(b, b.fmul(power, part), part, part), floats(1.0))
    exponent = b.shl(b.add(b.fptosi(whole, VI), ints(127)), ints(23))
    return b.fmul(power, b.bitcast(exponent, VF))


def tanh(b, x):
    """tanh(x) = 1 - 2 / (e^2x + 1) for 16 lanes, absolute error below 1e-6."""
    wide = exp(b, b.fmul(x, floats(2.0)))
    return b.fsub(floats(1.0), b.fdiv(floats(2.0), b.fadd(wide, floats(1.0))))


def log(b, x):
    """Natural logarithm of 16 positive normal floats, relative error below 2e-7 away from 1 (Cephes' polynomial)."""
    bits = b.bitcast(x, VI)
    power = b.sitofp(b.sub(b.lshr(bits, ints(23)), ints(126)), VF)
    part = b.bitcast(b.or_(b.and_(bits, ints(0x7FFFFF)), ints(0x3F000000)), VF)  # 0.5 .. 1
    low = b.fcmp_ordered("<", part, floats(0.7071067811865476))
    power = b.select(low, b.fsub(power, floats(1.0)), power)
    part = b.fsub(b.select(low, b.fadd(part, part), part), floats(1.0))
    square = b.fmul(part, part)
    y = floats(7.0376836292e-2)
    for c in (
        -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1,
        -2.4999993993e-1, 3.3333331174e-1,
    ):  # fmt: skip
        y = fma(b, y, part, floats(c))
    y = b.fmul(b.fmul(y, part), square)
    y = fma(b, power, floats(-2.12194440e-4), y)
    y = fma(b, square, floats(-0.5), y)
    return fma(b, power, floats(0.693359375), b.fadd(part, y))


def widen_half(b, x, target: Target):
    """float16 (as <16 x i16>) to float32, exactly (infinities and NaN excepted on the portable target)."""
    if target.half:
        return b.fpext(b.bitcast(x, vector(F16)), VF)
    bits = b.zext(x, VI)
    sign = b.shl(b.and_(bits, ints(0x8000)), ints(16))
    # The exponent bias differs by 112: shift the bits into place and let one multiplication fix it (denormals too).
    magnitude = b.fmul(b.bitcast(b.shl(b.and_(bits, ints(0x7FFF)), ints(13)), VF), floats(2.0**112))
    return b.bitcast(b.or_(b.bitcast(magnitude, VI), sign), VF)


def round_bf16(b, x):
    """float32 to bfloat16 bits, to nearest even: <16 x float> to <16 x i16>. NaN becomes some NaN or infinity."""
    bits = b.bitcast(x, VI)
    odd = b.and_(b.lshr(bits, ints(16)), ints(1))
    rounded = b.lshr(b.add(bits, b.add(odd, ints(0x7FFF))), ints(16))
    return b.trunc(rounded, vector(I16))


def dot_bf16(b, target: Target, total, x, y):
    """total [16] + x . y over pairs: x, y are <16 x i32>, each lane two bfloat16."""
    if target.bf16:
        pairs = vector(_BFLOAT16, 32)
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        return call(b, name, VF, total, b.bitcast(x, pairs), b.bitcast(y, pairs))
    for half in ("low", "high"):
        parts = []
        for value in (x, y):
            bits = b.shl(value, ints(16)) if half == "low" else b.and_(value, ints(0xFFFF0000 - (1 << 32)))
            parts.append(b.bitcast(bits, VF))
        total = fma(b, parts[0], parts[1], total)
    return total


def dot_bytes(b, target: Target, total, weights, tokens, bits):
    """total [16] + weights . tokens over groups of four bytes.

    ``weights`` <64 x i8> hold unsigned values of ``bits`` bits, ``tokens`` <64 x i8> signed ones. Where
    ``target.signed_bytes``, 8-bit weights count as weight - 128.
    """
    if target.dot == "vnni":
        return call(b, "llvm.x86.avx512.vpdpbusd.512", VI, total, weights, tokens)
    if target.signed_bytes and bits == 8:
        weights = b.xor(weights, ints(-128, VBYTES))
    if target.dot == "maddubs":
        return _dot_maddubs(b, total, weights, tokens, bits)
    if target.dot == "sdot":
        return _dot_sdot(b, total, weights, tokens)
    wide, other = b.bitcast(weights, VI), b.bitcast(tokens, VI)
    for byte in range(4):
        one = b.and_(b.lshr(wide, ints(8 * byte)), ints(255))
        two = b.ashr(b.shl(other, ints(24 - 8 * byte)), ints(24))
        total = b.add(total, b.mul(one, two))
    return total


def _slices(b, value, parts):
    """Cut a vector into ``parts`` equal vectors (free where they are registers)."""
    size = value.type.count // parts
    for part in range(parts):
        mask = ir.Constant(vector(I32, size), [part * size + i for i in range(size)])
        yield b.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask)


def _join(b, parts):
    """The inverse of ``_slices``."""
    while len(parts) > 1:
        size = parts[0].type.count * 2
        mask = ir.Constant(vector(I32, size), list(range(size)))
        parts = [b.shuffle_vector(parts[i], parts[i + 1], mask) for i in range(0, len(parts), 2)]
    return parts[0]


def look_up(b, target: Target, table, places):
    """table[place] for 64 places from 0 to 15; ``table``: 16 numbers of 8 bits."""
    parts, name = {
        "vnni": (1, "llvm.x86.avx512.pshuf.b.512"),
        "maddubs": (2, "llvm.x86.avx2.pshuf.b"),
        "sdot": (4, "llvm.aarch64.neon.tbl1.v16i8"),
    }.get(target.dot, (0, ""))
    if parts == 0:
        return _choose(b, table, places, 8)
    size = 64 // parts
    kind = vector(I8, size)
    values = ir.Constant(
        vector(I8, 16 if parts == 4 else size), list(table) * (1 if parts == 4 else size // 16)
    )
    return _join(b, [call(b, name, kind, values, part) for part in _slices(b, places, parts)])


def _choose(b, table, places, bit):
    """One of 2 ``bit`` numbers by the bits of the places, from ``bit`` down: a tree of choices."""
    if bit == 0:
        return ints(table[0], VBYTES)
    upper = b.icmp_unsigned("!=", b.and_(places, ints(bit, VBYTES)), ints(0, VBYTES))
    return b.select(
        upper, _choose(b, table[bit:], places, bit // 2), _choose(b, table[:bit], places, bit // 2)
    )


def _dot_maddubs(b, total, weights, tokens, bits):
    """AVX2: unsigned x signed bytes to int16 pairs, then to int32. |w| <= 128 and |a| <= 127: pairs never saturate."""
    out = []
    for part, w, a in zip(_slices(b, total, 2), _slices(b, weights, 2), _slices(b, tokens, 2)):
        if bits == 8:  # |w| . sign(a, w), since both operands signed is not an instruction
            a = call(b, "llvm.x86.avx2.psign.b", w.type, a, w)
            zero = ints(0, w.type)
            w = b.select(b.icmp_signed("<", w, zero), b.sub(zero, w), w)
        pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", vector(I16, 16), w, a)
        summed = call(b, "llvm.x86.avx2.pmadd.wd", vector(I32, 8), pairs, ints(1, vector(I16, 16)))
        out.append(b.add(part, summed))
    return _join(b, out)


def _dot_sdot(b, total, weights, tokens):
    """NEON: signed x signed, four bytes a lane."""
    name, kind = "llvm.aarch64.neon.sdot.v4i32.v16i8", vector(I32, 4)
    parts = zip(_slices(b, total, 4), _slices(b, weights, 4), _slices(b, tokens, 4))
    return _join(b, [call(b, name, kind, part, w, a) for part, w, a in parts])


class _BFloat16(ir.Type):
    """llvmlite has no name for LLVM's bfloat."""

    intrinsic_name = "bf16"

    def __str__(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat16)

    def __hash__(self):
        return hash(_BFloat16)


_BFLOAT16 = _BFloat16()
