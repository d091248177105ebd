"""Codes in the order of tensor cores (``Layout.fragments``), taken apart: numbers, scales, and whole weights."""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.device.kernels.triton.packed import _codes, _factors, _half, _spread


@triton.jit
def _pair(words, high, J: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr, NIBBLES):
    """base + code as KIND of places 2 J and 2 J + 1, codes of 4 to 6 bits; they are neighbours in a new last dimension."""
    pair = (words >> (J * 4)) & NIBBLES
    if HIGH == 1:
        pair = pair | (((high >> J) & 0x00010001) << 4)
    if HIGH == 2:
        pair = pair | (((high >> (J * 2)) & 0x00030003) << 4)
    if KIND == tl.bfloat16:
        pair = pair | 0x43004300
    else:
        pair = pair | 0x64006400
    return tl.join(pair.to(tl.int16).to(KIND, bitcast=True), (pair >> 16).to(tl.int16).to(KIND, bitcast=True))


@triton.jit
def _byte(word, at: tl.constexpr):
    """A byte of a word as float32, by its bits: the conversion of whole numbers is slow."""
    return (((word >> at) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _four(
    words, high, FIRST: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr, CODE: tl.constexpr, KIND: tl.constexpr, NIBBLES
):  # fmt: skip
    """The codes of four places, in two last dimensions: i, e; small floats, bytes and float32 as ``_codes`` gives them."""
    if CODE == 0 and BITS == 4 and KIND != tl.float32:
        return tl.join(
            _pair(words, high, FIRST // 2, HIGH, KIND, NIBBLES), _pair(words, high, FIRST // 2 + 1, HIGH, KIND, NIBBLES)
        )  # fmt: skip
    elif CODE == 0 and BITS == 8:
        return tl.join(
            tl.join(_byte(words, FIRST * 8), _byte(words, FIRST * 8 + 8)),
            tl.join(_byte(words, FIRST * 8 + 16), _byte(words, FIRST * 8 + 24)),
        )
    else:
        return tl.join(
            tl.join(
                _codes(words, high, FIRST, BITS, HIGH, CODE, KIND), _codes(words, high, FIRST + 1, BITS, HIGH, CODE, KIND)
            ),
            tl.join(
                _codes(words, high, FIRST + 2, BITS, HIGH, CODE, KIND), _codes(words, high, FIRST + 3, BITS, HIGH, CODE, KIND)
            ),
        )  # fmt: skip


@triton.jit
def all_codes(
    words, high, BITS: tl.constexpr, HIGH: tl.constexpr, CODE: tl.constexpr, KIND: tl.constexpr, NIBBLES
):
    """All codes of words [.., t, q] as [.., t, 32-blocks, i, e, T]: input 16 T + 8 e + 2 t + i of a block."""
    if BITS == 4:
        found = tl.join(
            _four(words, high, 0, BITS, HIGH, CODE, KIND, NIBBLES), _four(words, high, 4, BITS, HIGH, CODE, KIND, NIBBLES)
        )  # fmt: skip
    else:
        found = _four(words, high, 0, BITS, HIGH, CODE, KIND, NIBBLES)
    return found


@triton.jit
def _scale(
    word, outer, index, base, SCALES: tl.constexpr, OFFSET: tl.constexpr, HALF: tl.constexpr, CODE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """(s, z) of group ``index`` of a scale word: value = s * (base + code) + z, or EXACT as ``_factors`` gives them."""
    if EXACT:
        s, z = _factors(word, outer, index, SCALES, OFFSET, HALF)
    elif SCALES == 3:
        s = _half(outer, HALF) * _byte(word >> (index * 16), 0)
        z = -base * s - _half(outer >> 16, HALF) * _byte(word >> (index * 16), 8)
    else:
        s, z = _factors(word, outer, index, SCALES, OFFSET, HALF)
        if CODE != 0:
            z = tl.zeros_like(s)
        elif SCALES == 2:
            z = -base * s - z
        else:
            z = -s * (base + z)
    return s, z


@triton.jit
def factors_of(
    words, outer, index, base, IN: tl.constexpr, SCALES: tl.constexpr, OFFSET: tl.constexpr, HALF: tl.constexpr,
    CODE: tl.constexpr, EXACT: tl.constexpr = False,
):  # fmt: skip
    """(s, z) of IN groups of scale words, from ``index`` on; they are neighbours in new last dimensions."""
    s, z = _scale(words, outer, index, base, SCALES, OFFSET, HALF, CODE, EXACT)
    if IN >= 2:
        s1, z1 = _scale(words, outer, 1, base, SCALES, OFFSET, HALF, CODE, EXACT)
        if IN == 4:
            s2, z2 = _scale(words, outer, 2, base, SCALES, OFFSET, HALF, CODE, EXACT)
            s3, z3 = _scale(words, outer, 3, base, SCALES, OFFSET, HALF, CODE, EXACT)
            s, z = tl.join(s, s2), tl.join(z, z2)
            s1, z1 = tl.join(s1, s3), tl.join(z1, z3)
        s, z = tl.join(s, s1), tl.join(z, z1)
    return s, z


@triton.jit
def place_in_word(part, GROUP: tl.constexpr, PART: tl.constexpr, IN_WORD: tl.constexpr, P: tl.constexpr):
    """Which group of its scale word part ``part`` begins with."""
    index = part * 0
    if P == 1 and IN_WORD > 1 and GROUP > 0:
        index = (part // (GROUP // PART) if GROUP > PART else part) % IN_WORD
    return index


@triton.jit
def fetch_scales(
    scale, outer, part, own, N, inside, GROUP: tl.constexpr, PART: tl.constexpr, SCALES: tl.constexpr, IN_WORD: tl.constexpr,
    WORDS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Scale words [.., WORDS] of part ``part`` of outputs ``own`` [.., 1], and what stands above them."""
    above = own
    if SCALES == 3 or SCALES == 4:
        above = tl.load(outer + part * PART // 256 * N + own, mask=inside, other=0)
    group = part * P
    if GROUP == 0:
        group = part * 0
    elif GROUP > PART:
        group = part // (GROUP // PART)
    return tl.load(scale + (group // IN_WORD + tl.arange(0, WORDS)) * N + own, mask=inside, other=0), above


@triton.jit
def part_values(
    words, high, scale, outer, part, own, N, base, nibbles,
    W: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, CODE: tl.constexpr, SCALES: tl.constexpr,
    IN_WORD: tl.constexpr, OFFSET: tl.constexpr, HALF: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr,
    WR: tl.constexpr,
):  # fmt: skip
    """Values of one part [ROWS, PART] in KIND, rounded once, for outputs ``own`` in the order r rh v g of row 16 WR r + 16 v +
    8 rh + g: neighbouring rows for the threads of a warp, then warps, then the rows that a thread has."""
    PART: tl.constexpr = 16 * (32 // BITS)
    P: tl.constexpr = PART // GROUP if GROUP > 0 and GROUP < PART else 1
    WORDS: tl.constexpr = P // IN_WORD if P > IN_WORD else 1
    IN: tl.constexpr = 1 if P == 1 else IN_WORD
    at = own.to(tl.int64)[:, None] * W + tl.arange(0, 16)[None, :]
    start = part // (W // 16) * tl.cast(N * W, tl.int64) + part % (W // 16) * 16
    tile = tl.load(words + at + start)
    extra = tile
    if HIGH > 0:
        extra = _spread(tl.load(high + at + start), HIGH)
    factors, above = fetch_scales(
        scale, outer, part, own[:, None], N, (own >= 0)[:, None], GROUP, PART, SCALES, IN_WORD, WORDS, P
    )  # fmt: skip
    index = place_in_word(part, GROUP, PART, IN_WORD, P)
    s, z = factors_of(factors, above, index, base, IN, SCALES, OFFSET, HALF, CODE)
    s, z = tl.reshape(s, (ROWS, 1, P, 1, 1, 1, 1)), tl.reshape(z, (ROWS, 1, P, 1, 1, 1, 1))
    codes = all_codes(tile, extra, BITS, HIGH, CODE, KIND, nibbles).to(tl.float32)
    codes = tl.reshape(codes, (ROWS, 4, P, PART // 32 // P, 2, 2, 2))
    if CODE == 0:
        codes = codes * s + z
    else:
        codes = codes * s
    codes = tl.reshape(codes.to(KIND), (ROWS // (16 * WR), 2, WR, 8, 4, PART // 32, 2, 2, 2))
    if BITS == 4:  # r 0 rh 1 v 2 g 3 t 4 block 5 i 6 e 7 T 8
        codes = tl.permute(codes, (0, 2, 1, 3, 5, 8, 7, 4, 6))
    else:  # r 0 rh 1 v 2 g 3 t 4 block 5 T 6 i 7 e 8
        codes = tl.permute(codes, (0, 2, 1, 3, 5, 6, 8, 4, 7))
    return tl.reshape(codes, (ROWS, PART))


@triton.jit
def rows_from(first, N, ROWS: tl.constexpr, WR: tl.constexpr):
    """Outputs from ``first`` on in the order that ``part_values`` wants, those beyond the last one replaced by it."""
    row = tl.arange(0, ROWS)
    row = row // (16 * WR) * (16 * WR) + row // 8 % WR * 16 + row // (8 * WR) % 2 * 8 + row % 8
    return tl.minimum(first + row, N - 1)
