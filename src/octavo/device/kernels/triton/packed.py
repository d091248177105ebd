"""Linear maps over packed codes on a GPU (``octavo.device.ops.packed``), three ways by the number of tokens.

up to 16     skinny: bound by reading codes. An OR with the bits of 128 (float16: 1024) makes two bfloat16 numbers of two
             codes at once; that offset, zero points and minimums are taken off the sums of a group by means of the sum of its
             inputs, which the tensor cores deliver beside them. Where outputs are few, ranges of inputs are separate programs,
             and the last to finish adds their sums, always in one order.
up to 1023   tiles: weights are scaled in registers and rounded once.
more         values are written out, some outputs at a time, and the library multiplies.

The weight is the left operand, so that tensor cores read it from registers, and few tokens waste little.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from octavo.device.kernels.triton.split import finish

SKINNY = 16  # most tokens for which the scales multiply sums, not weights
WRITE_OUT_FROM = 1024
WRITE_OUT_ELEMENTS = 1 << 26  # 128 MiB of bfloat16
BLOCKS = (8, 16, 32, 64)  # tokens of a tile
LARGE_BLOCKS = (*BLOCKS, 128)  # where there is shared memory for it: 160 KiB
TARGET_PROGRAMS = 512  # a few on every multiprocessor of a large GPU
MAX_SPLITS = 16
CODES = {"int": 0, "e2m1": 1, "nf4": 2, "e4m3": 3, "iq4": 4}
SCALES = {"zero": 0, "pair": 1, "minimum": 2, "k": 3, "bytes": 4, "e4m3": 5, "float": 6, "k4": 7}
GROUPS_IN_WORD = (1, 2, 1, 2, 4, 4, 1, 4)


@triton.jit
def _spread(high, HIGH: tl.constexpr):
    """High bits of a word's even places in its low half, those of odd places in its high half."""
    wide = high.to(tl.int32)
    if HIGH == 1 and high.dtype != tl.int16:  # as int16 they are of words of 2-bit codes
        return (wide & 0xF) | ((wide & 0xF0) << 12)
    else:
        return (wide & 0xFF) | ((wide & 0xFF00) << 8)


@triton.jit
def _nf4(code):
    """The value of a code: a tree of choices by its bits."""
    odd, two, four, eight = (code & 1) != 0, (code & 2) != 0, (code & 4) != 0, (code & 8) != 0
    a = tl.where(two, tl.where(odd, -0.39491748809814453, -0.5250730514526367),
                 tl.where(odd, -0.6961928009986877, -1.0))  # fmt: skip
    b = tl.where(two, tl.where(odd, 0.0, -0.09105003625154495),
                 tl.where(odd, -0.18477343022823334, -0.28444138169288635))  # fmt: skip
    c = tl.where(two, tl.where(odd, 0.33791524171829224, 0.24611230194568634),
                 tl.where(odd, 0.16093020141124725, 0.07958029955625534))  # fmt: skip
    d = tl.where(two, tl.where(odd, 1.0, 0.7229568362236023),
                 tl.where(odd, 0.5626170039176941, 0.44070982933044434))  # fmt: skip
    return tl.where(eight, tl.where(four, d, c), tl.where(four, b, a))


@triton.jit
def _iq4(code, BASE: tl.constexpr):
    """The value of BASE + code, a float32: a polynomial that stays within 0.434 of the table's whole numbers, rounded to
    them by a sum with 1.5 * 2^23, beside which there are whole numbers alone."""
    t = code - (BASE + 7.526164531707764)
    near = (((1.58604e-3 * t + 7.88337e-2) * t - 0.131011) * t + 11.5102) * t + (12582912.0 - 4.0)
    return near - 12582912.0


@triton.jit
def _base(KIND: tl.constexpr, BITS: tl.constexpr, CODE: tl.constexpr):
    """What ``_codes`` adds to every code: the number whose bits it ORs them into."""
    if CODE != 0 or BITS == 8 or KIND == tl.float32:
        return 0.0
    elif KIND == tl.bfloat16:
        return 128.0
    else:
        return 1024.0


@triton.jit
def _whole(words, high, PLACE: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr):
    """base + code as KIND, of codes of 2 to 6 bits."""
    MASK: tl.constexpr = 0x00010001 * ((1 << BITS) - 1)
    pair = (words >> (PLACE // 2 * BITS)) & MASK
    if HIGH == 1:
        pair = pair | (((high >> (PLACE // 2)) & 0x00010001) << BITS)
    if HIGH == 2:
        pair = pair | (((high >> (PLACE // 2 * 2)) & 0x00030003) << 4)
    if KIND == tl.bfloat16:
        return ((pair | 0x43004300) >> (PLACE % 2 * 16)).to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif KIND == tl.float16:
        return ((pair | 0x64006400) >> (PLACE % 2 * 16)).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        return ((pair >> (PLACE % 2 * 16)) & 0xFF).to(tl.float32)


@triton.jit
def _e2m1(words, PLACE: tl.constexpr, KIND: tl.constexpr):
    """The values of codes of a sign, two bits of exponent, one of mantissa: subnormal numbers, which a product brings up."""
    pair = words >> (PLACE // 2 * 4)
    if KIND == tl.bfloat16:
        pair = ((pair & 0x00070007) << 6) | ((pair & 0x00080008) << 12)
        small = (pair >> (PLACE % 2 * 16)).to(tl.int16).to(tl.bfloat16, bitcast=True)
        return (small.to(tl.float32) * 8.507059173023462e37).to(tl.bfloat16)
    elif KIND == tl.float16:
        pair = ((pair & 0x00070007) << 9) | ((pair & 0x00080008) << 12)
        return (pair >> (PLACE % 2 * 16)).to(tl.int16).to(tl.float16, bitcast=True) * 16384.0
    else:
        code = pair >> (PLACE % 2 * 16)
        return (((code & 7) << 22) | ((code & 8) << 28)).to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def _codes(
    words,
    high,
    PLACE: tl.constexpr,
    BITS: tl.constexpr,
    HIGH: tl.constexpr,
    CODE: tl.constexpr,
    KIND: tl.constexpr,
):
    """The codes at one place of all words: base + code, or the value of a small float; tables and bytes as float32."""
    if CODE == 3:
        # Sign, four bits of exponent, three of mantissa; 2^120 makes up for the other bias.
        byte = words >> (PLACE * 8)
        return (((byte & 0x7F) << 20) | ((byte & 0x80) << 24)).to(
            tl.float32, bitcast=True
        ) * 1.329227995784916e36
    elif BITS == 8:
        return ((words >> (PLACE * 8)) & 0xFF).to(tl.float32)
    elif CODE == 2:
        return _nf4((words >> (PLACE // 2 * 4 + PLACE % 2 * 16)) & 0xF)
    elif CODE == 4:
        return _iq4(_whole(words, high, PLACE, 4, 0, KIND).to(tl.float32), _base(KIND, 4, 0))
    elif CODE == 1:
        return _e2m1(words, PLACE, KIND)
    else:
        return _whole(words, high, PLACE, BITS, HIGH, KIND)


@triton.jit
def _half(word, HALF: tl.constexpr):
    """The low half of a word as float32."""
    return word.to(tl.int16).to(HALF, bitcast=True).to(tl.float32)


@triton.jit
def _factors(word, outer, index, SCALES: tl.constexpr, OFFSET: tl.constexpr, HALF: tl.constexpr):
    """(s, z) of group ``index`` of a scale word, in float32: value = s * (code - z), or s * code - z with minimums."""
    if SCALES == 6:
        s = word.to(tl.float32, bitcast=True)
    elif SCALES == 5:
        bits = word >> (index * 8)
        # Sign, four bits of exponent, three of mantissa; 2^120 makes up for the other bias.
        bits = ((bits & 0x7F) << 20) | ((bits & 0x80) << 24)
        s = outer.to(tl.float32, bitcast=True) * (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36)
    elif SCALES == 4:
        s = _half(outer, HALF) * (word >> (index * 8)).to(tl.int8).to(tl.float32)
    elif SCALES == 3:
        s = _half(outer, HALF) * ((word >> (index * 16)) & 0xFF).to(tl.float32)
    elif SCALES == 7:
        s = _half(outer, HALF) * ((word >> (index * 8)) & 0xF).to(tl.float32)
    elif SCALES == 1:
        s = _half(word >> (index * 16), HALF)
    else:
        s = _half(word, HALF)
    if SCALES == 0:
        z = (word >> 16).to(tl.float32)
    elif SCALES == 2:
        z = _half(word >> 16, HALF)
    elif SCALES == 3:
        z = _half(outer >> 16, HALF) * ((word >> (index * 16 + 8)) & 0xFF).to(tl.float32)
    elif SCALES == 7:
        z = _half(outer >> 16, HALF) * ((word >> (index * 8 + 4)) & 0xF).to(tl.float32)
    else:
        z = tl.zeros_like(s) + OFFSET
    return s, z


@triton.jit
def _values(codes, s, z, base, SCALES: tl.constexpr, CODE: tl.constexpr, KIND: tl.constexpr):
    """Scaled values, rounded once to KIND."""
    wide = codes.to(tl.float32)
    if CODE != 0:
        return (wide * s[:, None]).to(KIND)
    elif SCALES == 2 or SCALES == 3 or SCALES == 7:
        return ((wide - base) * s[:, None] - z[:, None]).to(KIND)
    else:
        return ((wide - (base + z)[:, None]) * s[:, None]).to(KIND)


@triton.jit
def _scaled(part, total, s, z, base, SCALES: tl.constexpr, CODE: tl.constexpr):
    """The products of a group from those of its codes, and the sum of its inputs."""
    if CODE != 0:
        return part * s[:, None]
    elif SCALES == 2 or SCALES == 3 or SCALES == 7:
        return part * s[:, None] - total * (base * s + z)[:, None]
    else:
        return (part - total * (base + z)[:, None]) * s[:, None]


@triton.jit
def packed_products(
    acc, x, words, high, scale, outer, m, n, M, N, K, stride_x, first, last,
    W: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, CODE: tl.constexpr, SCALES: tl.constexpr,
    IN_WORD: tl.constexpr, OFFSET: tl.constexpr, HALF: tl.constexpr, SKINNY: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_N, BLOCK_M] plus the products of runs [first, last) for outputs n and rows m of x, those from 0 to M - 1."""
    KIND: tl.constexpr = x.dtype.element_ty
    RUN: tl.constexpr = W * (32 // BITS)
    WORD: tl.constexpr = GROUP * IN_WORD  # inputs of a scale word
    SUMS: tl.constexpr = SKINNY and CODE == 0
    base = _base(KIND, BITS, CODE)
    w = tl.arange(0, W)
    rows = x + m.to(tl.int64)[None, :] * stride_x
    live = ((m >= 0) & (m < M))[None, :]
    own = tl.where(n < N, n, 0)
    ones = tl.full((BLOCK_N, W), 1.0, KIND)
    part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    above = own  # unused where scales have one level
    if SCALES == 5:
        above = tl.load(outer + own)
    if GROUP == 0:
        s, z = _factors(tl.load(scale + own), above, 0, SCALES, OFFSET, HALF)
    for run in tl.range(first, last, num_stages=STAGES):
        at = (run * N + own).to(tl.int64)[:, None] * W + w[None, :]
        tile = tl.load(words + at)
        extra = tile
        if HIGH > 0:
            extra = _spread(tl.load(high + at), HIGH)
        if SCALES == 3 or SCALES == 4 or SCALES == 7:
            above = tl.load(outer + run * RUN // 256 * N + own)
        for place in tl.static_range(32 // BITS):
            k = run * RUN + place * W + w
            if EVEN:
                operand = tl.load(rows + k[:, None], mask=live, other=0.0)
            else:
                operand = tl.load(rows + k[:, None], mask=live & (k < K)[:, None], other=0.0)
            if GROUP > 0:
                if place == 0 or place * W % WORD == 0:
                    word = tl.load(scale + (run * RUN + place * W) // WORD * N + own)
                if place == 0 or place * W % GROUP == 0:
                    if RUN % WORD == 0:
                        s, z = _factors(word, above, place * W // GROUP % IN_WORD, SCALES, OFFSET, HALF)
                    else:
                        index = (run * RUN + place * W) // GROUP % IN_WORD
                        s, z = _factors(word, above, index, SCALES, OFFSET, HALF)
                    part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            codes = _codes(tile, extra, place, BITS, HIGH, CODE, KIND)
            if SKINNY:
                part = tl.dot(codes.to(KIND), operand, part, input_precision="ieee")
                if SUMS:
                    total = tl.dot(ones, operand, total, input_precision="ieee")
                if GROUP > 0:  # noqa: SIM102 (constants of the compiler, one at a time)
                    if place == 32 // BITS - 1 or (place + 1) * W % GROUP == 0:
                        acc += _scaled(part, total, s, z, base, SCALES, CODE)
            else:
                acc = tl.dot(
                    _values(codes, s, z, base, SCALES, CODE, KIND), operand, acc, input_precision="ieee"
                )
    if SKINNY and GROUP == 0:
        acc += _scaled(part, total, s, z, base, SCALES, CODE)
    return acc


@triton.jit(do_not_specialize=["M", "runs", "per_split"])
def _linear_kernel(
    out, sums, counters, x, words, high, scale, outer, bias, M, N, K, runs, per_split, stride_x, stride_out,
    W: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, CODE: tl.constexpr, SCALES: tl.constexpr,
    IN_WORD: tl.constexpr, OFFSET: tl.constexpr, HALF: tl.constexpr, SKINNY: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of BLOCK_M tokens over one range of runs. SPLIT as in ``split.finish``."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    acc = packed_products(
        tl.zeros((BLOCK_N, BLOCK_M), tl.float32), x, words, high, scale, outer, m, n, M, N, K, stride_x,
        split * per_split, tl.minimum(split * per_split + per_split, runs), W, BITS, HIGH, GROUP, CODE, SCALES, IN_WORD,
        OFFSET, HALF, SKINNY, EVEN, BLOCK_M, BLOCK_N, STAGES,
    )  # fmt: skip
    finish(acc, out, sums, counters, bias, m, n, M, N, stride_out, split, tl.num_programs(2), SPLIT, BIAS)


@triton.jit(do_not_specialize=["begin", "count"])
def _unpack_kernel(
    out, words, high, scale, outer, N, K, begin, count,
    W: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, CODE: tl.constexpr, SCALES: tl.constexpr,
    IN_WORD: tl.constexpr, OFFSET: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The values of one run of outputs begin + [0, count), as rows of out [count, K]."""
    RUN: tl.constexpr = W * (32 // BITS)
    run = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = begin + tl.where(row < count, row, 0)
    w = tl.arange(0, W)
    at = (run * N + own).to(tl.int64)[:, None] * W + w[None, :]
    tile = tl.load(words + at)
    extra = tile
    if HIGH > 0:
        extra = _spread(tl.load(high + at), HIGH)
    above = own
    if SCALES == 5:
        above = tl.load(outer + own)
    if SCALES == 3 or SCALES == 4 or SCALES == 7:
        above = tl.load(outer + run * RUN // 256 * N + own)
    for place in tl.static_range(32 // BITS):
        first = run * RUN + place * W
        group = first // (GROUP if GROUP > 0 else 1 << 30)
        word = tl.load(scale + group // IN_WORD * N + own)
        s, z = _factors(word, above, group % IN_WORD, SCALES, OFFSET, HALF)
        codes = _codes(tile, extra, place, BITS, HIGH, CODE, tl.float32)
        values = _values(codes, s, z, 0.0, SCALES, CODE, out.dtype.element_ty)
        k = first + w
        inside = (row < count)[:, None] & (k < K)[None, :]
        tl.store(out + row.to(tl.int64)[:, None] * K + k[None, :], values, mask=inside)


def constants(layout: Any) -> dict[str, Any]:
    """What kernels know of a ``Layout`` when they are compiled."""
    scales = SCALES[layout.scales]
    return {
        "W": layout.width,
        "BITS": layout.bits,
        "HIGH": layout.high_bits,
        "GROUP": layout.group,
        "CODE": CODES[layout.code],
        "SCALES": scales,
        "IN_WORD": GROUPS_IN_WORD[scales],
        "OFFSET": layout.offset,
        "HALF": tl.float16 if layout.half == torch.float16 else tl.bfloat16,
    }


def write_out(weight: Any, rows: slice, dtype: torch.dtype) -> Tensor:
    """The values of some outputs [rows, K] in ``dtype``, inputs in stored order."""
    count = rows.stop - rows.start
    out = torch.empty((count, weight.inputs), dtype=dtype, device=weight.words.device)
    _unpack_kernel[(weight.words.shape[0], triton.cdiv(count, 64))](
        out, weight.words, weight.high, weight.scale, weight.outer, weight.outputs, weight.inputs, rows.start, count,
        **constants(weight.layout), BLOCK_N=64, num_warps=4,
    )  # fmt: skip
    return out


def tile(block: int) -> tuple[int, int, int]:
    """Outputs, warps and stages of the software pipeline for tiles of ``block`` tokens.

    Two warps keep to the older tensor core instructions, which need no fence between few tokens' products.
    """
    return (64, 2, 3) if block <= SKINNY else (64, 4, 2) if block <= 64 else (128, 8, 2)


class LinearPacked:
    """``octavo.device.ops.packed.linear_packed`` on a GPU; the tensors of the weight are contiguous.

    An instance keeps the zeroed counters of its split products. Its first call runs every kernel it may need once, so that
    none compiles later.
    """

    @staticmethod
    def write_out(weight: Any, rows: slice, dtype: torch.dtype) -> Tensor:
        """The values of some outputs."""
        return write_out(weight, rows, dtype)

    def __init__(self, large: bool = False, pdl: bool = False) -> None:
        self.blocks = LARGE_BLOCKS if large else BLOCKS
        self.pdl = pdl
        self.counters: Tensor | None = None

    def __call__(
        self, x: Tensor, weight: Any, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        tokens, outputs = x.shape[0], weight.outputs
        if out is None:
            out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
        if tokens == 0:
            return out
        if self.counters is None:
            self.counters = torch.zeros(2 * TARGET_PROGRAMS, dtype=torch.int32, device=x.device)
            self._warm(x, weight, bias)
        if weight.order is not None:
            x = x.index_select(1, weight.order)
        if tokens >= WRITE_OUT_FROM:
            return self._library(x, weight, bias, out)
        block = next((size for size in self.blocks if size >= tokens), self.blocks[-1])
        self._launch(block, x, weight, bias, out)
        return out

    def _warm(self, x: Tensor, weight: Any, bias: Tensor | None) -> None:
        out = torch.empty((1, weight.outputs), dtype=x.dtype, device=x.device)
        for block in self.blocks:
            self._launch(block, x[:1], weight, bias, out)
        self.write_out(weight, slice(0, 1), x.dtype)

    def _library(self, x: Tensor, weight: Any, bias: Tensor | None, out: Tensor) -> Tensor:
        times = triton.cdiv(weight.outputs * weight.inputs, WRITE_OUT_ELEMENTS)
        step = (
            triton.cdiv(triton.cdiv(weight.outputs, times), 128) * 128
        )  # equal parts of whole tiles of the library
        for start in range(0, weight.outputs, step):
            rows = slice(start, min(start + step, weight.outputs))
            part = None if bias is None else bias[rows]
            out[:, rows] = F.linear(x, self.write_out(weight, rows, x.dtype), part)
        return out

    def _launch(self, block: int, x: Tensor, weight: Any, bias: Tensor | None, out: Tensor) -> None:
        """One kernel with tiles of ``block`` tokens."""
        tokens, outputs, layout = x.shape[0], weight.outputs, weight.layout
        skinny = block <= SKINNY
        block_n, warps, stages = tile(block)
        runs = weight.words.shape[0]
        columns, rows = triton.cdiv(outputs, block_n), triton.cdiv(tokens, block)
        per_split = triton.cdiv(runs, max(1, min(MAX_SPLITS, runs, TARGET_PROGRAMS // (columns * rows))))
        ranges = triton.cdiv(runs, per_split)
        sums = out
        if ranges > 1:
            sums = torch.empty((ranges, tokens, outputs), dtype=torch.float32, device=x.device)
        launch = {"launch_pdl": True} if self.pdl and skinny else {}
        _linear_kernel[(rows, columns, ranges)](
            out, sums, self.counters, x, weight.words, weight.high, weight.scale, weight.outer, bias, tokens, outputs,
            weight.inputs, runs, per_split, x.stride(0), out.stride(0), **constants(layout), SKINNY=skinny,
            EVEN=weight.inputs % layout.run == 0, BLOCK_M=block, BLOCK_N=block_n, STAGES=stages, SPLIT=ranges > 1,
            BIAS=bias is not None, PDL=self.pdl and skinny, num_warps=warps, **launch,
        )  # fmt: skip


class LinearPackedHopper(LinearPacked):
    """With dependent launch for few tokens, and larger tiles for many."""

    def __init__(self) -> None:
        super().__init__(large=True, pdl=True)
