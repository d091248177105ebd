"""Repacking of the simple block types into panels (see ``formats``, whose numpy functions are the reference).

A block of a row is some float16 fields and then 32 weights as 32-bit words; in a panel, word w of the 16 rows lies side by
side, and so does field f.
"""

from __future__ import annotations

from numba import types
from numba.extending import register_jitable

from octavo.device.kernels.numba import memory as mem
from octavo.device.kernels.numba.rows import address_of

# Entries of ``args``. SOURCE: rows of ROW_BYTES with blocks of BLOCK_BYTES; OUT: weights (the upper plane), SCALES, LOWER
# (0: one plane); FIELDS float16 fields, where FIFTH is 1 a word of fifth bits, then WORDS words xor FLIP; SCRATCH: 512 bytes
# a thread.
SOURCE, ROW_BYTES, BLOCK_BYTES, BLOCKS, PANELS, FIELDS, FIFTH, WORDS, FLIP, OUT, SCALES, LOWER, SCRATCH = (
    range(13)
)
NIBBLES, PAIRS = 0x0F0F0F0F0F0F0F0F, 0x0303030303030303


@register_jitable
def join_pairs(source, first, shift, target):
    """Two bits each, from bit ``shift`` on, of the bytes of vectors first .. first + 3, joined to bytes."""
    for at in range(0, 64, 8):
        joined = 0
        for i in range(4):
            word = mem.load_i64(source + 64 * (first + i) + at)
            joined |= ((word >> shift) & PAIRS) << (2 * i)
        mem.store_i64(target + at, joined)


@register_jitable
def split_block(source, upper, lower):
    """512 bytes of a block as 384 of the upper plane and 128 of the lower one."""
    for i in range(4):
        for at in range(64 * i, 64 * i + 64, 8):
            first, second = mem.load_i64(source + at), mem.load_i64(source + 256 + at)
            mem.store_i64(upper + at, ((first >> 2) & NIBBLES) | (((second >> 2) & NIBBLES) << 4))
    join_pairs(source, 0, 6, upper + 256)
    join_pairs(source, 4, 6, upper + 320)
    join_pairs(source, 0, 0, lower)
    join_pairs(source, 4, 0, lower + 64)


@register_jitable
def join_fifth(bits, row, target):
    """The fifth bits of a row's 32 weights into its four bits of the block's eight 64-bit words."""
    for word in range(8):
        known = 0 if row == 0 else mem.load_i64(target + 8 * word)
        mem.store_i64(target + 8 * word, known | (((bits >> (4 * word)) & 15) << (4 * row)))


def pack_blocks(args, thread, threads):
    """args: see above."""
    row_bytes, block_bytes, blocks = (
        address_of(args, ROW_BYTES),
        address_of(args, BLOCK_BYTES),
        address_of(args, BLOCKS),
    )
    fields, words, flip = address_of(args, FIELDS), address_of(args, WORDS), address_of(args, FLIP)
    lower, fifth = address_of(args, LOWER), address_of(args, FIFTH)
    items = address_of(args, PANELS) * blocks
    for item in range(items * thread // threads, items * (thread + 1) // threads):
        source = address_of(args, SOURCE) + item // blocks * 16 * row_bytes + item % blocks * block_bytes
        scales = address_of(args, SCALES) + item * fields * 32
        target = address_of(args, OUT) + item * (words + fifth) * 64
        if lower != 0:
            target = address_of(args, SCRATCH) + 512 * thread
        for row in range(16):
            at = source + row * row_bytes
            for field in range(fields):
                mem.store_u16(scales + 32 * field + 2 * row, mem.load_u16(at + 2 * field))
            at += 2 * fields
            if fifth != 0:
                join_fifth(types.int64(mem.load_i32(at)), row, target + 64 * words)
                at += 4
            for word in range(words):
                mem.store_i32(target + 64 * word + 4 * row, mem.load_i32(at + 4 * word) ^ flip)
        if lower != 0:
            split_block(target, address_of(args, OUT) + item * 384, lower + item * 128)
