"""Per-head q/k norm, rotary embedding, and the store of keys and values into pages: one pass over the qkv rows.

A page holds, per kv head, first the keys then the values of its tokens, in blocks of 16 tokens as bfloat16:

    keys    [D / 2][16 tokens][2]   lane t of vector i: dims 2i and 2i+1 of token t
    values  [8 pairs][D][2]         lane d of a vector: tokens 2j and 2j+1 of dim d

so that q.k and p.v are both pair products of 16 lanes. Values that are not finite are stored as 0, since a page is reused
by other sequences and 0 * NaN would reach them; the token is marked instead, so that its own sequence fails.
"""

from __future__ import annotations

from numba import types
from numba.extending import register_jitable

from octavo.device.kernels.numba import memory as mem
from octavo.device.kernels.numba.rows import address_of, float_of, scale_vector, sum_squares


@register_jitable
def bf16_bits(x):
    """bfloat16 bits (low 16 of a uint32) of a float32, to nearest even; 0 where x is not finite."""
    bits = mem.float_bits(x)
    if bits & types.uint32(0x7F800000) == types.uint32(0x7F800000):
        return types.uint32(0)
    odd = (bits >> types.uint32(16)) & types.uint32(1)
    return types.uint32((bits + types.uint32(0x7FFF) + odd) >> types.uint32(16))


@register_jitable
def infinite(x):
    """True where x is infinite or not a number."""
    return mem.float_bits(x) & types.uint32(0x7F800000) == types.uint32(0x7F800000)


@register_jitable
def prepare_head(head, weight, eps, size, table, rotary):
    """Norm (weight 0 = none) and rotate (table 0 = none) one head of ``size`` floats in place."""
    if weight != 0:
        total = types.float32(0)
        for i in range(size):
            x = mem.load_f32(head + 4 * i)
            total += x * x
        factor = types.float32(1) / types.float32((total / types.float32(size) + eps) ** types.float32(0.5))
        for i in range(size):
            x = mem.load_f32(head + 4 * i) * factor * mem.load_f32(weight + 4 * i)
            mem.store_f32(head + 4 * i, x)
    if table != 0:
        half = rotary // 2
        for i in range(half):
            cos, sin = mem.load_f32(table + 4 * i), mem.load_f32(table + 4 * (half + i))
            x, y = mem.load_f32(head + 4 * i), mem.load_f32(head + 4 * (half + i))
            mem.store_f32(head + 4 * i, x * cos - y * sin)
            mem.store_f32(head + 4 * (half + i), y * cos + x * sin)


def whole_norm(args, thread, threads):
    """RMSNorm of all query heads of a token together, and of all its key heads, in place. args: count, qkv, floats of a row,
    of its queries, of its keys, query weight, key weight, eps."""
    tokens, width = mem.load_i64(address_of(args, 0)), address_of(args, 2)
    for item in range(2 * tokens * thread // threads, 2 * tokens * (thread + 1) // threads):
        row = address_of(args, 1) + item // 2 * width * 4
        size, weight = address_of(args, 3), address_of(args, 5)
        if item % 2 == 1:
            row, size, weight = row + size * 4, address_of(args, 4), address_of(args, 6)
        mean = sum_squares(row, size) / types.float32(size)
        factor = types.float32(1) / types.float32((mean + float_of(args, 7)) ** types.float32(0.5))
        for at in range(0, size * 4, 64):
            scale_vector(row + at, weight + at, factor)


@register_jitable
def store_pair(address, x, y):
    """Two floats as a bfloat16 pair."""
    mem.store_u32(address, types.uint32(bf16_bits(x) | types.uint32(bf16_bits(y) << types.uint32(16))))


def rope_store(args, thread, threads):
    """args: count, qkv, heads, kv heads, head dim, q weight, k weight, eps, cos/sin table [tokens, rotary], rotary, slot
    table (int64: page * page size + offset), the layer's first page, bytes between pages, page size, q out (bfloat16 [tokens, heads, D]),
    broken (int64 [tokens], set to 1 where a key or value is not finite)."""
    tokens = mem.load_i64(address_of(args, 0))
    qkv, heads, kv_heads, size = (
        address_of(args, 1),
        address_of(args, 2),
        address_of(args, 3),
        address_of(args, 4),
    )
    q_weight, k_weight, eps = address_of(args, 5), address_of(args, 6), float_of(args, 7)
    tables, rotary, slots = address_of(args, 8), address_of(args, 9), address_of(args, 10)
    pages, page_bytes, page_size = address_of(args, 11), address_of(args, 12), address_of(args, 13)
    out, group = address_of(args, 14), heads // kv_heads
    first, last = tokens * kv_heads * thread // threads, tokens * kv_heads * (thread + 1) // threads
    for item in range(first, last):
        m, h = item // kv_heads, item % kv_heads
        row = qkv + m * (heads + 2 * kv_heads) * size * 4
        table = 0 if tables == 0 else tables + m * rotary * 4
        for g in range(h * group, (h + 1) * group):
            head, target = row + g * size * 4, out + (m * heads + g) * size * 2
            prepare_head(head, q_weight, eps, size, table, rotary)
            for i in range(0, size, 2):
                store_pair(target + 2 * i, mem.load_f32(head + 4 * i), mem.load_f32(head + 4 * i + 4))
        key = row + (heads + h) * size * 4
        value = key + kv_heads * size * 4
        prepare_head(key, k_weight, eps, size, table, rotary)
        slot = mem.load_i64(slots + 8 * m)
        offset = slot % page_size
        block = pages + slot // page_size * page_bytes + h * page_size * size * 4 + offset // 16 * size * 32
        t, bad = offset % 16, False
        for i in range(0, size, 2):
            bad |= infinite(mem.load_f32(key + 4 * i)) | infinite(mem.load_f32(key + 4 * i + 4))
            store_pair(block + i * 32 + t * 4, mem.load_f32(key + 4 * i), mem.load_f32(key + 4 * i + 4))
        block += page_size * size * 2 + t // 2 * size * 4 + t % 2 * 2
        for i in range(size):
            bad |= infinite(mem.load_f32(value + 4 * i))
            mem.store_u16(block + 4 * i, types.uint16(bf16_bits(mem.load_f32(value + 4 * i))))
        if bad:
            mem.store_i64(address_of(args, 15) + 8 * m, 1)
