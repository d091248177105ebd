"""Latent attention in full heads, for prompts: latents are gathered, projected for some heads at a time, then attended.

    pages ── gather ──► latents [K, latent + rope] ── product ──► keys and values [K, G heads, nope + value] ── attend

Heads are independent, so however many keys there are, a group of heads fits into the workspace; nothing is merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)  # stands for -inf as a running maximum: differences of it stay numbers


@dataclass(frozen=True)
class Tiles:
    """Launch shape: queries, keys a turn, warps, software pipeline depth."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@triton.jit
def _gather_kernel(
    out, pages, slots, stride_page, stride_slot, WIDTH: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr
):
    """out[i] = the values at slot i."""
    index = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + index)
    dims = tl.arange(0, PADDED)
    row = pages + (slot // PAGE) * stride_page + (slot % PAGE) * stride_slot
    values = tl.load(row + dims, mask=dims < WIDTH, other=0.0)
    tl.store(out + index * WIDTH + dims, values.to(out.dtype.element_ty), mask=dims < WIDTH)


@triton.jit
def _fold(
    acc, total, best, q, q_rope, keys, ropes, begin, end, query_at, kv_len, stride_key, stride_rope, unit,
    NOPE: tl.constexpr, NPAD: tl.constexpr, ROPE: tl.constexpr, RPAD: tl.constexpr, VALUE: tl.constexpr,
    VPAD: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold keys [begin, end) into (acc, total, best); without MASKED all exist and are visible to all queries."""
    dims, turned, outs = tl.arange(0, NPAD), tl.arange(0, RPAD), tl.arange(0, VPAD)
    for start in range(begin, end, BLOCK_N):
        key_at = start + tl.arange(0, BLOCK_N)
        there = key_at < kv_len
        row = key_at.to(tl.int64)[:, None] * stride_key
        k = tl.load(keys + row + dims[None, :], mask=there[:, None] & (dims < NOPE)[None, :], other=0.0)
        v = tl.load(
            keys + row + NOPE + outs[None, :], mask=there[:, None] & (outs < VALUE)[None, :], other=0.0
        )
        at = key_at.to(tl.int64)[:, None] * stride_rope + turned[None, :]
        r = tl.load(ropes + at, mask=there[:, None] & (turned < ROPE)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = tl.dot(q_rope, tl.trans(r), scores, input_precision=PRECISION) * unit
        if MASKED:
            visible = (key_at[None, :] <= query_at[:, None]) & there[None, :]
            scores = tl.where(visible, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(q.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        best = new_best
    return acc, total, best


@triton.jit(
    do_not_specialize=["num_rows", "first_head"],
    do_not_specialize_on_alignment=("begins", "first_query", "first_key"),
)
def _prefill_kernel(
    out, q, wide, latents, heads, begins, first_query, first_key, num_rows, first_head, scale,
    stride_token, stride_head, stride_wide, stride_wide_head, stride_key, stride_out,
    LATENT: tl.constexpr, NOPE: tl.constexpr, NPAD: tl.constexpr, ROPE: tl.constexpr, RPAD: tl.constexpr,
    VALUE: tl.constexpr, VPAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one row for one head; row r owns the tiles from first_query[r] // BLOCK_M + r on."""
    local, pid = tl.program_id(0), tl.program_id(1)
    low: tl.int32 = 0
    high = num_rows
    while high - low > 1:  # the last row whose first tile is not after ours
        middle = (low + high) // 2
        here = tl.load(first_query + middle) // BLOCK_M + middle <= pid
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle)
    row = low
    queries = tl.load(first_query + row)
    count = tl.load(first_query + row + 1) - queries
    tile = (
        tl.cdiv(count, BLOCK_M) - 1 - (pid - (queries // BLOCK_M + row))
    )  # longest ranges of keys start first
    if tile < 0:
        return
    origin = tl.load(first_key + row)
    kv_len = tl.load(first_key + row + 1) - origin
    head = first_head + local
    token = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = token < count
    query_at = kv_len - count + token
    place = (tl.load(begins + row) + token).to(tl.int64)[:, None]
    dims, turned, outs = tl.arange(0, NPAD), tl.arange(0, RPAD), tl.arange(0, VPAD)
    plain_q = tl.load(
        q + place * stride_token + head * stride_head + dims[None, :],
        mask=real[:, None] & (dims < NOPE)[None, :], other=0.0,
    )  # fmt: skip
    turned_q = tl.load(
        wide + place * stride_wide + head * stride_wide_head + LATENT + turned[None, :],
        mask=real[:, None] & (turned < ROPE)[None, :], other=0.0,
    )  # fmt: skip
    best = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, VPAD), tl.float32)
    keys = heads + origin.to(tl.int64) * stride_key + local * (NOPE + VALUE)
    ropes = latents + origin.to(tl.int64) * (LATENT + ROPE) + LATENT
    end = tl.minimum(kv_len, kv_len - count + (tile + 1) * BLOCK_M)
    plain = (kv_len - count + tile * BLOCK_M + 1) // BLOCK_N * BLOCK_N
    acc, total, best = _fold(
        acc, total, best, plain_q, turned_q, keys, ropes, 0, plain, query_at, kv_len, stride_key, LATENT + ROPE,
        scale * LOG2E, NOPE, NPAD, ROPE, RPAD, VALUE, VPAD, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    acc, total, best = _fold(
        acc, total, best, plain_q, turned_q, keys, ropes, plain, end, query_at, kv_len, stride_key, LATENT + ROPE,
        scale * LOG2E, NOPE, NPAD, ROPE, RPAD, VALUE, VPAD, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    target = out + place * stride_out + head * VALUE + outs[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=real[:, None] & (outs < VALUE)[None, :])


def prefill_tiles(query_dim: int, wide: bool, large: bool) -> Tiles:
    """``wide`` = 4-byte elements, ``large`` = the shared memory of data-centre GPUs."""
    if wide:
        return Tiles(32, 16, 4, 1)
    if not large or query_dim > 256:
        return Tiles(64, 32, 4, 1)
    if query_dim > 192:
        return Tiles(64, 64, 4, 2)
    return Tiles(128, 64, 8, 2)


def latent_prefill(
    out: Tensor,
    q: Tensor,
    wide: Tensor,
    up: Tensor,
    pages: Tensor,
    slots: Tensor,
    begins: Tensor,
    first_query: Tensor,
    first_key: Tensor,
    scale: float,
    work: Tensor,
    *,
    large: bool = False,
) -> None:
    """``octavo.device.ops.latent.latent_prefill`` on a GPU; all tensors but q, wide and pages are contiguous.

    ``large``: the GPU has at least 160 KiB of shared memory a multiprocessor.
    """
    num_heads, both, latent = up.shape
    width, value, keys = wide.shape[2], out.shape[2], slots.shape[0]
    rope, nope = width - latent, both - value
    room = work.view(q.dtype)
    latents = room[: keys * width].view(keys, width)
    room = room[triton.cdiv(keys * width, 128) * 128 :]
    _gather_kernel[(keys,)](
        latents, pages, slots, pages.stride(0), pages.stride(1),
        WIDTH=width, PADDED=triton.next_power_of_2(width), PAGE=pages.shape[1], num_warps=2,
    )  # fmt: skip
    tiles = prefill_tiles(nope + rope, q.element_size() == 4, large)
    rows = begins.shape[0]
    blocks = q.shape[0] // tiles.block_m + rows
    group = min(num_heads, room.numel() // (keys * both))
    for first in range(0, num_heads, group):
        some = min(group, num_heads - first)
        heads = room[: keys * some * both].view(keys, some * both)
        torch.mm(latents[:, :latent], up[first : first + some].flatten(0, 1).t(), out=heads)
        _prefill_kernel[(some, blocks)](
            out, q, wide, latents, heads, begins, first_query, first_key, rows, first, scale,
            q.stride(0), q.stride(1), wide.stride(0), wide.stride(1), some * both, out.stride(0),
            LATENT=latent, NOPE=nope, NPAD=max(16, triton.next_power_of_2(nope)), ROPE=rope,
            RPAD=max(16, triton.next_power_of_2(rope)), VALUE=value, VPAD=max(16, triton.next_power_of_2(value)),
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, PRECISION="ieee" if q.element_size() == 4 else "tf32",
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip


latent_prefill_hopper = partial(latent_prefill, large=True)
