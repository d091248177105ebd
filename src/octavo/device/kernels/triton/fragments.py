"""Linear maps over packed codes that lie as the tensor cores take them (``Layout.fragments``), three ways by the number of tokens.

up to 8      few: bound by reading codes. A warp has 16 or 32 outputs and goes through parts of the inputs, the next codes on
             their way while it computes; at the end the warps of a program that have the same outputs add up. The scales multiply
             sums; zero points are taken off by means of the sum of a group's inputs, which the tensor cores deliver.
up to 511    tiles: weights are scaled in registers, rounded once, and multiplied from there.
more         values are written out, some outputs at a time, and the library multiplies.

A thread that loads four words has what it multiplies: nothing goes through shared memory, and a mask and an OR make two
neighbouring numbers, which are one register. That holds as long as the compiler gives tensors of pointers the layout that the
order of their dimensions suggests: the last one first, then from the front (Triton 3.6) or from the back (3.7 to 3.9, ``BACK``).
``tests/ops/test_ahead.py`` looks at what it made of them; with another choice the product is slower, not wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.device.kernels.triton import packed
from octavo.device.kernels.triton.fragment_codes import (
    all_codes,
    factors_of,
    fetch_scales,
    part_values,
    place_in_word,
    rows_from,
)
from octavo.device.kernels.triton.packed import LinearPacked, _base, _spread, constants
from octavo.device.kernels.triton.split import finish

FEW = 8  # most tokens for which the scales multiply sums, not weights
WRITE_OUT_FROM = 512
TILES = (16, 32, 64, 128)  # tokens of a tile
LARGE_TILES = (*TILES, 256)  # where there is shared memory for it: 210 KiB
TARGET_TILES = 264  # two on every multiprocessor of a large GPU; one where they are large
# For one token, and for more. Codes of 4 bits whose scales are of pieces of a part take more registers, 8 bits less.
ENOUGH_WARPS = {"bytes": (3072, 1536), "parts": (1792, 1536), "pieces": (1536, 768)}
MANY_OUTPUTS = 16384
MAX_SPLITS = 16
# An argument of kernels, and not a constant, so that a mask and an OR are one instruction: it takes one constant only.
NIBBLES = 0x000F000F
# Whether the compiler hands out threads from the last dimensions of pointers on, or (3.6) from the first.
BACK = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) > (3, 6))


@triton.jit
def _turned(tensor):
    """Dimensions t g b rh and one more as the compiler wants them for pointers; done twice, as they were."""
    if BACK:
        tensor = tl.permute(tensor, (3, 2, 1, 0, 4))
    return tensor


@triton.jit
def _fetch(
    words, high, scale, outer, part, parts, row, own, N, t,
    W: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr, SCALES: tl.constexpr,
    IN_WORD: tl.constexpr, WORDS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """A part of the words of some outputs, their high bits, and their scale words: t g b rh q, t g b rh WORDS. Zeros where
    there is no such part."""
    q = tl.arange(0, 4)[None, None, None, None, :]
    at = (part // (W // 16) * N + row).to(tl.int64) * W + part % (W // 16) * 16 + t * 4 + q
    at, part, own = _turned(at), _turned(part), _turned(own)
    inside = part < parts
    tile = tl.load(words + at, mask=inside, other=0)
    extra = tile
    if HIGH > 0:
        extra = tl.load(high + at, mask=inside, other=0)
    factors, above = fetch_scales(scale, outer, part, own, N, inside, GROUP, PART, SCALES, IN_WORD, WORDS, P)
    return _turned(tile), _turned(extra), _turned(factors), _turned(above)


@triton.jit
def _inputs(
    x, m, M, part, parts, K, stride_x, t, PART: tl.constexpr, P: tl.constexpr, WARPS: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """Inputs of part ``part`` [P WARPS, PART / P, 8], as the tensor cores take them."""
    # t n b 16-blocks e i
    block = tl.arange(0, PART // 16)[None, None, None, :, None, None]
    e = tl.arange(0, 2)[None, None, None, None, :, None]
    i = tl.arange(0, 2)[None, None, None, None, None, :]
    k = part * PART + block * 16 + e * 8 + t * 2 + i
    at = m.to(tl.int64) * stride_x + k
    inside = tl.broadcast_to((m < M) & (part < parts) if EVEN else (m < M) & (k < K), at.shape)
    if BACK:
        at, inside = tl.permute(at, (3, 4, 2, 1, 0, 5)), tl.permute(inside, (3, 4, 2, 1, 0, 5))
    found = tl.load(x + at, mask=inside, other=0.0)
    if BACK:
        found = tl.permute(found, (4, 3, 2, 0, 1, 5))
    found = tl.reshape(found, (4, 8, WARPS, P, PART // 32 // P, 2, 2, 2))
    # t 0 n 1 b 2 p 3 block 4 T 5 e 6 i 7
    return tl.reshape(tl.permute(found, (3, 2, 4, 6, 0, 5, 7, 1)), (P * WARPS, PART // P, 8))


@triton.jit
def _products(
    acc, x, tile, extra, factors, above, part, base, nibbles,
    BITS: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, CODE: tl.constexpr, SCALES: tl.constexpr,
    IN_WORD: tl.constexpr, OFFSET: tl.constexpr, HALF: tl.constexpr, KIND: tl.constexpr, PART: tl.constexpr,
    P: tl.constexpr, WARPS: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """acc [P, WARPS, NB, 2, 8, 4, 2] plus the products of one part of 16 NB outputs with x [P WARPS, PART / P, 8]."""
    if HIGH > 0:
        extra = _spread(extra, HIGH)
    codes = all_codes(tile, extra, BITS, HIGH, CODE, KIND, nibbles).to(KIND)
    codes = tl.reshape(codes, (4, 8, WARPS, 2 * NB, P, PART // 32 // P, 2, 2, 2))
    if BITS == 4:  # t 0 g 1 b 2 rh 3 p 4 block 5 i 6 e 7 T 8
        codes = tl.permute(codes, (4, 2, 3, 1, 5, 7, 0, 8, 6))
    else:  # t 0 g 1 b 2 rh 3 p 4 block 5 T 6 i 7 e 8
        codes = tl.permute(codes, (4, 2, 3, 1, 5, 8, 0, 6, 7))
    codes = tl.reshape(codes, (P * WARPS, 16 * NB, PART // P))
    IN: tl.constexpr = 1 if P == 1 else IN_WORD
    index = place_in_word(part, GROUP, PART, IN_WORD, P)
    s, z = factors_of(factors, above, index, base, IN, SCALES, OFFSET, HALF, CODE)
    s = tl.permute(tl.reshape(s, (4, 8, WARPS, NB, 2, P)), (5, 2, 3, 4, 1, 0))
    acc += tl.reshape(tl.dot(codes, x), (P, WARPS, NB, 2, 8, 4, 2)) * tl.expand_dims(s, -1)
    if CODE == 0:
        z = tl.permute(tl.reshape(z, (4, 8, WARPS, NB, 2, P)), (5, 2, 3, 4, 1, 0))
        one = tl.full((P * WARPS, 16, PART // P // 2), 1.0, KIND)
        ones = tl.reshape(tl.join(one, one), (P * WARPS, 16, PART // P))
        total = tl.reshape(tl.dot(ones, x), (P, WARPS, 1, 2, 8, 4, 2))  # for all outputs the same
        acc += total * tl.expand_dims(z, -1)
    return acc


@triton.jit(do_not_specialize=["nibbles", "M", "parts"])
def _few_kernel(
    out, x, words, high, scale, outer, bias, nibbles, M, N, K, parts, stride_x, stride_out,
    W: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, CODE: tl.constexpr, SCALES: tl.constexpr,
    IN_WORD: tl.constexpr, OFFSET: tl.constexpr, HALF: tl.constexpr, KS: tl.constexpr, WN: tl.constexpr, NB: tl.constexpr,
    EVEN: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """WN times 16 NB outputs of up to 8 tokens. WN warps side by side read the same inputs, which one of them brings into the
    first cache, and each of KS such teams takes every KS-th part of the inputs."""
    KIND: tl.constexpr = x.dtype.element_ty
    PART: tl.constexpr = 16 * (32 // BITS)
    P: tl.constexpr = PART // GROUP if GROUP > 0 and GROUP < PART else 1
    WORDS: tl.constexpr = P // IN_WORD if P > IN_WORD else 1
    base = _base(KIND, BITS, CODE)
    # Dimensions: thread of four, row of eight, warp, eight rows of all, word of four.
    t = tl.arange(0, 4)[:, None, None, None, None]
    warp = tl.arange(0, KS * WN)[None, None, :, None, None]
    rows = tl.arange(0, 2 * NB)[None, None, None, :, None] * 8 + tl.arange(0, 8)[None, :, None, None, None]
    part = warp // WN
    first = tl.program_id(0) * (16 * NB * WN)
    # The compiler would see neighbours in scales of neighbouring outputs, and choose another layout for them.
    unknown = K >> 31
    row = tl.minimum(first + warp % WN * (16 * NB) + rows, N - 1)
    own = (row ^ unknown) + t * 0
    a, b, c, d = _fetch(
        words, high, scale, outer, part, parts, row, own, N, t, W, HIGH, GROUP, PART, SCALES, IN_WORD, WORDS, P
    )  # fmt: skip
    if PDL:  # weights were there before the kernels in front of this one
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    lane = tl.arange(0, 4)[:, None, None, None, None, None]
    m = tl.arange(0, 8)[None, :, None, None, None, None]
    acc = tl.zeros((P, KS * WN, NB, 2, 8, 4, 2), tl.float32)
    for start in tl.range(0, parts, KS, num_stages=1):
        e, f, g, h = _fetch(
            words, high, scale, outer, part + KS, parts, row, own, N, t,
            W, HIGH, GROUP, PART, SCALES, IN_WORD, WORDS, P,
        )  # fmt: skip
        # Always so, which the compiler does not know. Without a branch it would ask for the next words when it is done with
        # these, to have fewer registers in use.
        if start < parts + unknown:
            these = _inputs(
                x, m, M, tl.expand_dims(part, -1), parts, K, stride_x, lane, PART, P, KS * WN, EVEN
            )  # fmt: skip
            acc = _products(
                acc, these, a, b, c, d, part, base, nibbles,
                BITS, HIGH, GROUP, CODE, SCALES, IN_WORD, OFFSET, HALF, KIND, PART, P, KS * WN, NB,
            )  # fmt: skip
        a, b, c, d = e, f, g, h
        part += KS
    y = tl.sum(tl.reshape(acc, (P * KS, 16 * NB * WN, 8)), 0)
    n = first + tl.arange(0, 16 * NB * WN)
    tokens = tl.arange(0, 8)
    if BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    inside = (n < N)[:, None] & (tokens < M)[None, :]
    tl.store(out + tokens[None, :].to(tl.int64) * stride_out + n[:, None], y.to(KIND), mask=inside)


@triton.jit
def settled(acc, ASYNC: tl.constexpr):
    """``acc``, once the tensor cores are done with its product.

    Hopper's read their left operand from registers while the program goes on. Triton 3.6 waits for them late enough that the
    next turn of a loop writes those registers first; whoever needs the sum in the same turn waits for it there.
    """
    if ASYNC:
        acc = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=True, pack=1
        )
    return acc


@triton.jit(do_not_specialize=["nibbles", "M", "parts", "per_split"])
def _tile_kernel(
    out, sums, counters, x, words, high, scale, outer, bias, nibbles, M, N, K, parts, per_split, stride_x, stride_out,
    W: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, CODE: tl.constexpr, SCALES: tl.constexpr,
    IN_WORD: tl.constexpr, OFFSET: tl.constexpr, HALF: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WR: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr,
    ASYNC: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of BLOCK_M tokens over one range of parts of the inputs."""
    KIND: tl.constexpr = x.dtype.element_ty
    PART: tl.constexpr = 16 * (32 // BITS)
    base = _base(KIND, BITS, CODE)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_N
    split = tl.program_id(2)
    k = tl.arange(0, PART)
    own = rows_from(first, N, BLOCK_N, WR)
    right = x + tl.minimum(m, M - 1).to(tl.int64)[None, :] * stride_x + k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for part in tl.range(
        split * per_split, tl.minimum(split * per_split + per_split, parts), num_stages=STAGES
    ):
        if EVEN:
            b = tl.load(right + part * PART)
        else:
            b = tl.load(right + part * PART, mask=(part * PART + k < K)[:, None], other=0.0)
        a = part_values(
            words, high, scale, outer, part, own, N, base, nibbles,
            W, BITS, HIGH, GROUP, CODE, SCALES, IN_WORD, OFFSET, HALF, KIND, BLOCK_N, WR,
        )  # fmt: skip
        acc = settled(tl.dot(a, b, acc), ASYNC)
    n = first + tl.arange(0, BLOCK_N)
    finish(acc, out, sums, counters, bias, m, n, M, N, stride_out, split, tl.num_programs(2), SPLIT, BIAS)


@triton.jit(do_not_specialize=["begin", "count"])
def _write_kernel(
    out, words, high, scale, outer, N, K, begin, count,
    W: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, CODE: tl.constexpr, SCALES: tl.constexpr,
    IN_WORD: tl.constexpr, OFFSET: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The values of one part of outputs begin + [0, count), exactly as the format has them, as rows of out [count, K]."""
    PART: tl.constexpr = 16 * (32 // BITS)
    P: tl.constexpr = PART // GROUP if GROUP > 0 and GROUP < PART else 1
    WORDS: tl.constexpr = P // IN_WORD if P > IN_WORD else 1
    part = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = begin + tl.minimum(row, count - 1)
    at = (
        (part // (W // 16) * N + own).to(tl.int64)[:, None] * W
        + part % (W // 16) * 16
        + tl.arange(0, 16)[None, :]
    )
    tile = tl.load(words + at)
    extra = tile
    if HIGH > 0:
        extra = _spread(tl.load(high + at), HIGH)
    factors, above = fetch_scales(
        scale, outer, part, own[:, None], N, (own >= 0)[:, None], GROUP, PART, SCALES, IN_WORD, WORDS, P
    )  # fmt: skip
    index = place_in_word(part, GROUP, PART, IN_WORD, P)
    s, z = factors_of(factors, above, index, 0.0, 1 if P == 1 else IN_WORD, SCALES, OFFSET, HALF, CODE, True)
    s, z = tl.reshape(s, (BLOCK_N, 1, P, 1, 1, 1, 1)), tl.reshape(z, (BLOCK_N, 1, P, 1, 1, 1, 1))
    codes = all_codes(tile, extra, BITS, HIGH, CODE, tl.float32, 0).to(tl.float32)
    codes = tl.reshape(codes, (BLOCK_N, 4, P, PART // 32 // P, 2, 2, 2))
    if CODE != 0:
        values = codes * s
    elif SCALES == 2 or SCALES == 3:
        values = codes * s - z
    else:
        values = (codes - z) * s
    values = tl.reshape(values.to(out.dtype.element_ty), (BLOCK_N, 4, PART // 32, 2, 2, 2))
    if BITS == 4:  # n 0 t 1 block 2 i 3 e 4 T 5
        values = tl.permute(values, (0, 2, 5, 4, 1, 3))
    else:  # n 0 t 1 block 2 T 3 i 4 e 5
        values = tl.permute(values, (0, 2, 3, 5, 1, 4))
    k = part * PART + tl.arange(0, PART)
    inside = (row < count)[:, None] & (k < K)[None, :]
    place = out + row.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(place, tl.reshape(values, (BLOCK_N, PART)), mask=inside)


def write_out(weight: Any, rows: slice, dtype: torch.dtype) -> Tensor:
    """The values of some outputs [rows, K] in ``dtype``, inputs in stored order."""
    count = rows.stop - rows.start
    out = torch.empty((count, weight.inputs), dtype=dtype, device=weight.words.device)
    parts = triton.cdiv(weight.inputs, 16 * weight.layout.places)
    _write_kernel[(parts, triton.cdiv(count, 64))](
        out, weight.words, weight.high, weight.scale, weight.outer, weight.outputs, weight.inputs, rows.start, count,
        **constants(weight.layout), BLOCK_N=64, num_warps=4,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class Few:
    """How few tokens are multiplied: teams of warps, each with parts of the inputs of its own; warps of a team; and how many
    times 16 outputs each of these has."""

    teams: int
    side: int
    blocks: int


def few(tokens: int, outputs: int, inputs: int, layout: Any) -> Few:
    """The launch for up to 8 tokens: warps enough to keep the memory busy, and none without work. Measured on an H100
    (docs/performance.md)."""
    part = 16 * layout.places
    kind = "bytes" if layout.bits == 8 else "pieces" if 0 < layout.group < part else "parts"
    blocks = 1 if tokens == 1 and (kind == "pieces" or outputs < MANY_OUTPUTS) else 2
    parts, teams = triton.cdiv(inputs, part), 1
    while (
        teams < 16
        and teams * 2 <= parts
        and teams * triton.cdiv(outputs, 16 * blocks) < ENOUGH_WARPS[kind][tokens > 1]
    ):
        teams *= 2
    return Few(teams, max(1, 8 // teams), blocks)


def tile(block: int, outputs: int, large: bool) -> tuple[int, int, int]:
    """Outputs, warps and stages of the software pipeline for tiles of ``block`` tokens; ``large``: with 227 KiB of shared
    memory."""
    if block <= 64:
        return 64, 4, 4
    if block <= 128 or outputs < MANY_OUTPUTS:
        return 64, 4, 3 if large else 2
    return 128, 8, 3


class LinearFragments(LinearPacked):
    """``octavo.device.ops.packed.linear_packed`` on a GPU, either order of codes; the tensors of the weight are contiguous.

    An instance keeps the zeroed counters of its split products. Its first call runs every kernel it may need once, so that
    none compiles later.
    """

    @staticmethod
    def write_out(weight: Any, rows: slice, dtype: torch.dtype) -> Tensor:
        """The values of some outputs."""
        return (write_out if weight.layout.fragments else packed.write_out)(weight, rows, dtype)

    def __init__(self, large: bool = False, pdl: bool = False) -> None:
        super().__init__(large, pdl)
        self.large = large
        self.tiles = LARGE_TILES if large else TILES

    def __call__(
        self, x: Tensor, weight: Any, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        if not weight.layout.fragments:
            return super().__call__(x, weight, bias, out)
        tokens = x.shape[0]
        if out is None:
            out = torch.empty((tokens, weight.outputs), dtype=x.dtype, device=x.device)
        if tokens == 0:
            return out
        if self.counters is None:
            self.counters = torch.zeros(2 * TARGET_TILES, dtype=torch.int32, device=x.device)
            self._warm(x, weight, bias)
        if weight.order is not None:
            x = x.index_select(1, weight.order)
        # No tensor cores for float32: the library is as good.
        if tokens >= WRITE_OUT_FROM or x.dtype == torch.float32:
            return self._library(x, weight, bias, out)
        if tokens <= FEW:
            self._few(x, weight, bias, out)
        else:
            self._tiles(
                next((size for size in self.tiles if size >= tokens), self.tiles[-1]), x, weight, bias, out
            )
        return out

    def _warm(self, x: Tensor, weight: Any, bias: Tensor | None) -> None:
        if not weight.layout.fragments:
            return super()._warm(x, weight, bias)
        if x.dtype != torch.float32:
            out = torch.empty((WRITE_OUT_FROM, weight.outputs), dtype=x.dtype, device=x.device)
            several = x[:1].expand(WRITE_OUT_FROM, -1).contiguous()
            for tokens in (1, FEW):
                self._few(several[:tokens], weight, bias, out[:tokens])
            for block in self.tiles:
                self._tiles(block, several[:1], weight, bias, out[:1])
            self._tiles(self.tiles[-1], several, weight, bias, out)  # so many that inputs may not be split
        self.write_out(weight, slice(0, 1), x.dtype)

    def _few(self, x: Tensor, weight: Any, bias: Tensor | None, out: Tensor) -> None:
        """Up to ``FEW`` tokens."""
        tokens, outputs, layout = x.shape[0], weight.outputs, weight.layout
        parts = triton.cdiv(weight.inputs, 16 * layout.places)
        launch = few(tokens, outputs, weight.inputs, layout)
        early = {"launch_pdl": True} if self.pdl else {}
        _few_kernel[(triton.cdiv(outputs, 16 * launch.blocks * launch.side),)](
            out, x, weight.words, weight.high, weight.scale, weight.outer, bias, NIBBLES, tokens, outputs, weight.inputs,
            parts, x.stride(0), out.stride(0), **constants(layout), KS=launch.teams, WN=launch.side, NB=launch.blocks,
            EVEN=weight.inputs % (16 * layout.places) == 0, BIAS=bias is not None, PDL=self.pdl,
            num_warps=launch.teams * launch.side, **early,
        )  # fmt: skip

    def _tiles(self, block: int, x: Tensor, weight: Any, bias: Tensor | None, out: Tensor) -> None:
        """One kernel with tiles of ``block`` tokens."""
        tokens, outputs, layout = x.shape[0], weight.outputs, weight.layout
        block_n, warps, stages = tile(block, outputs, self.large)
        parts = triton.cdiv(weight.inputs, 16 * layout.places)
        columns, rows = triton.cdiv(outputs, block_n), triton.cdiv(tokens, block)
        target = TARGET_TILES // 2 if block > 128 else TARGET_TILES
        per_split = triton.cdiv(parts, max(1, min(MAX_SPLITS, parts, target // (columns * rows))))
        ranges = triton.cdiv(parts, per_split)
        sums = out
        if ranges > 1:
            sums = torch.empty((ranges, tokens, outputs), dtype=torch.float32, device=x.device)
        _tile_kernel[(rows, columns, ranges)](
            out, sums, self.counters, x, weight.words, weight.high, weight.scale, weight.outer, bias, NIBBLES, tokens, outputs,
            weight.inputs, parts, per_split, x.stride(0), out.stride(0), **constants(layout),
            EVEN=weight.inputs % (16 * layout.places) == 0, BLOCK_M=block, BLOCK_N=block_n, WR=warps, STAGES=stages,
            SPLIT=ranges > 1, BIAS=bias is not None, ASYNC=self.pdl, num_warps=warps,
        )  # fmt: skip


class LinearFragmentsHopper(LinearFragments):
    """With dependent launch for few tokens, and larger tiles for many."""

    def __init__(self) -> None:
        super().__init__(large=True, pdl=True)
