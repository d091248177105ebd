"""Compressed attention's small kernels in Triton: norm + rotation + store, the store of pieces, entries made of pieces.

Vectors rotate in neighbouring pairs, their last ROPE values only. Nothing here asks the host, so that steps can be recorded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 8  # of a query for one program
BLOCK = 1024  # values of a token's pieces copied by one program
TOKENS = 8  # whose pieces one step of an entry's sum reads


@triton.jit
def _angles(angle, dims, D: tl.constexpr, ROPE: tl.constexpr):
    """cos of each value's pair, and sin with the sign that its neighbour gets; 1 and 0 before the last ROPE values."""
    turned = (dims >= D - ROPE) & (dims < D)
    at = tl.where(turned, (dims - (D - ROPE)) // 2, 0)
    cos = tl.load(angle + at, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(angle + ROPE // 2 + at, mask=turned, other=0.0).to(tl.float32)
    return cos, tl.where(dims % 2 == 0, -sin, sin)


@triton.jit(do_not_specialize_on_alignment=("positions",))
def _rotate_kernel(
    out, x, cos_sin, positions, stride_token, stride_head, stride_rope,
    H: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, ROPE: tl.constexpr, HEADS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims = tl.arange(0, DPAD)
    cos, sin = _angles(cos_sin + tl.load(positions + token) * stride_rope, dims, D, ROPE)
    sin = -sin if BACK else sin
    for index in tl.static_range(HEADS):
        head = part * HEADS + index
        if head < H:
            row = x + token * stride_token + head * stride_head
            value = tl.load(row + dims, mask=dims < D, other=0.0).to(tl.float32)
            other = tl.load(row + (dims ^ 1), mask=dims < D, other=0.0).to(tl.float32)
            place = out + (token * H + head) * D + dims
            tl.store(place, (value * cos + other * sin).to(out.dtype.element_ty), mask=dims < D)


def rotate_pairs(x: Tensor, cos_sin: Tensor, positions: Tensor, back: bool = False) -> Tensor:
    """``octavo.device.ops.compressed.rotate_pairs`` on a GPU; heads of x are contiguous."""
    tokens, heads, size = x.shape
    out = torch.empty((tokens, heads, size), dtype=x.dtype, device=x.device)
    if tokens:
        _rotate_kernel[(tokens, triton.cdiv(heads, HEADS))](
            out, x, cos_sin, positions, x.stride(0), x.stride(1), cos_sin.stride(0), H=heads, D=size,
            DPAD=triton.next_power_of_2(size), ROPE=cos_sin.shape[1], HEADS=HEADS, BACK=back, num_warps=2,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize_on_alignment=("positions", "slot_mapping"))
def _head_store_kernel(
    out, q, key, weight, eps, cos_sin, positions, pages, slot_mapping,
    stride_token, stride_head, stride_key, stride_rope, stride_page, stride_slot,
    H: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (token, 0) norms, rotates and stores the key; (token, i) norms and rotates HEADS heads of the query."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims = tl.arange(0, DPAD)
    inside = dims < D
    cos, sin = _angles(cos_sin + tl.load(positions + token) * stride_rope, dims, D, ROPE)
    if part == 0:
        slot = tl.load(slot_mapping + token)
        if slot >= 0:
            row = key + token * stride_key
            value = tl.load(row + dims, mask=inside, other=0.0).to(tl.float32)
            other = tl.load(row + (dims ^ 1), mask=inside, other=0.0).to(tl.float32)
            unit = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
            value = value * unit * tl.load(weight + dims, mask=inside, other=0.0)
            other = other * unit * tl.load(weight + (dims ^ 1), mask=inside, other=0.0)
            value = value.to(key.dtype.element_ty).to(tl.float32)  # rounded as the norm alone would
            other = other.to(key.dtype.element_ty).to(tl.float32)
            place = pages + (slot // PAGE) * stride_page + (slot % PAGE) * stride_slot + dims
            tl.store(place, (value * cos + other * sin).to(pages.dtype.element_ty), mask=inside)
    else:
        for index in tl.static_range(HEADS):
            head = (part - 1) * HEADS + index
            if head < H:
                row = q + token * stride_token + head * stride_head
                value = tl.load(row + dims, mask=inside, other=0.0).to(tl.float32)
                other = tl.load(row + (dims ^ 1), mask=inside, other=0.0).to(tl.float32)
                unit = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
                value = (value * unit).to(q.dtype.element_ty).to(tl.float32)
                other = (other * unit).to(q.dtype.element_ty).to(tl.float32)
                place = out + (token * H + head) * D + dims
                tl.store(place, (value * cos + other * sin).to(out.dtype.element_ty), mask=inside)


def head_store(
    q: Tensor,
    key: Tensor,
    weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    pages: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """``octavo.device.ops.compressed.head_store`` on a GPU; heads of q and rows of key are contiguous."""
    tokens, heads, size = q.shape
    out = torch.empty((tokens, heads, size), dtype=q.dtype, device=q.device)
    if tokens:
        _head_store_kernel[(tokens, 1 + triton.cdiv(heads, HEADS))](
            out, q, key, weight, eps, cos_sin, positions, pages, slot_mapping, q.stride(0), q.stride(1), key.stride(0),
            cos_sin.stride(0), pages.stride(0), pages.stride(1), H=heads, D=size, DPAD=triton.next_power_of_2(size),
            ROPE=cos_sin.shape[1], PAGE=pages.shape[1], HEADS=HEADS, num_warps=2,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize_on_alignment=("slot_mapping",))
def _piece_kernel(
    pieces, pages, slot_mapping, stride_token, stride_page, stride_slot,
    W: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK values of one token."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        at = part * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(pieces + token * stride_token + at, mask=at < W, other=0.0)
        place = pages + (slot // PAGE) * stride_page + (slot % PAGE) * stride_slot + at
        tl.store(place, value.to(pages.dtype.element_ty), mask=at < W)


def piece_store(pieces: Tensor, pages: Tensor, slot_mapping: Tensor) -> None:
    """``octavo.device.ops.compressed.piece_store`` on a GPU; rows of pieces are contiguous."""
    tokens, width = pieces.shape
    if tokens:
        _piece_kernel[(tokens, triton.cdiv(width, BLOCK))](
            pieces, pages, slot_mapping, pieces.stride(0), pages.stride(0), pages.stride(1), W=width,
            PAGE=pages.shape[1], BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["stride_table", "stride_home"],
    do_not_specialize_on_alignment=("page_table", "rows", "seen", "entry_table"),
)
def _compress_kernel(
    pages, page_table, bias, weight, eps, cos_sin, rows, seen, entries, entry_table,
    stride_page, stride_slot, stride_table, stride_rope, stride_home, stride_entries, stride_entry,
    FIRST: tl.constexpr, RATE: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr,
    ROPE: tl.constexpr, PAGE: tl.constexpr, PER_PAGE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One token of the step: where it is the last of an entry's, the softmax over its tokens, TOKENS of them at a time."""
    token = tl.program_id(0)
    length = tl.load(seen + token)
    if (length > 0) & (length % RATE == 0):
        row = tl.load(rows + token).to(tl.int64)
        table = page_table + row * stride_table
        number = length // RATE - 1
        dims, lanes = tl.arange(0, DPAD), tl.arange(0, TOKENS)
        inside = dims < D
        best = tl.full((DPAD,), -1.0e30, tl.float32)
        total = tl.zeros((DPAD,), tl.float32)
        mixed = tl.zeros((DPAD,), tl.float32)
        for half in tl.static_range(WIDTH // D):  # first halves belong to the tokens of the entry before
            start = length - RATE * (WIDTH // D - half)
            if start >= 0:
                for begin in range(0, RATE, TOKENS):
                    index = begin + lanes
                    there = index < RATE
                    position = start + index
                    page = tl.load(table + position // PAGE, mask=there, other=0).to(tl.int64)
                    piece = pages + page * stride_page + (position % PAGE) * stride_slot + FIRST + half * D
                    wanted = there[:, None] & inside[None, :]
                    values = tl.load(piece[:, None] + dims[None, :], mask=wanted, other=0.0).to(tl.float32)
                    gates = tl.load(piece[:, None] + WIDTH + dims[None, :], mask=wanted, other=0.0).to(
                        tl.float32
                    )
                    own = bias + index[:, None] * WIDTH + half * D + dims[None, :]
                    gates += tl.load(own, mask=wanted, other=0.0)
                    gates = tl.where(there[:, None], gates, -1.0e30)
                    new_best = tl.maximum(best, tl.max(gates, 0))
                    shares = tl.where(there[:, None], tl.exp(gates - new_best[None, :]), 0.0)
                    shrink = tl.exp(best - new_best)
                    total = total * shrink + tl.sum(shares, 0)
                    mixed = mixed * shrink + tl.sum(shares * values, 0)
                    best = new_best
        mixed = tl.where(inside, mixed / tl.where(total > 0, total, 1.0), 0.0)
        unit = tl.rsqrt(tl.sum(mixed * mixed, 0) / D + eps)
        mixed = mixed * unit * tl.load(weight + dims, mask=inside, other=0.0)
        cos, sin = _angles(cos_sin + (number * RATE).to(tl.int64) * stride_rope, dims, D, ROPE)
        pairs = tl.reshape(mixed, (DPAD // 2, 2))
        even, odd = tl.split(pairs)
        other = tl.reshape(tl.join(odd, even), (DPAD,))
        home = tl.load(entry_table + row * stride_home + number // PER_PAGE).to(tl.int64)
        place = entries + home * stride_entries + (number % PER_PAGE) * stride_entry + dims
        tl.store(place, (mixed * cos + other * sin).to(entries.dtype.element_ty), mask=inside)


def compress(
    pages: Tensor,
    page_table: Tensor,
    first: int,
    bias: Tensor,
    weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    rows: Tensor,
    seen: Tensor,
    entries: Tensor,
    entry_table: Tensor,
) -> None:
    """``octavo.device.ops.compressed.compress`` on a GPU; bias is contiguous."""
    rate, width = bias.shape
    size = weight.shape[0]
    if len(rows):
        _compress_kernel[(len(rows),)](
            pages, page_table, bias, weight, eps, cos_sin, rows, seen, entries, entry_table, pages.stride(0),
            pages.stride(1), page_table.stride(0), cos_sin.stride(0), entry_table.stride(0), entries.stride(0),
            entries.stride(1), FIRST=first, RATE=rate, WIDTH=width, D=size, DPAD=triton.next_power_of_2(size),
            ROPE=cos_sin.shape[1], PAGE=pages.shape[1], PER_PAGE=entries.shape[1],
            TOKENS=min(TOKENS, triton.next_power_of_2(rate)), num_warps=4,
        )  # fmt: skip
