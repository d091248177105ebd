"""Recurrent layers in Triton: convolution, recurrence (a token or a chunk at a time) and gated norm.

Long rows go through the recurrence in chunks of C tokens. With G the running sum of g inside a chunk and S the state
before it, the delta rule over a chunk is a few small products (Yang et al. 2024, section 3):

    A = tril(beta K K^T exp(G_i - G_j), -1)        U = (I + A)^-1 beta (V - exp(G) K S)
    O = exp(G) Q S + tril(Q K^T exp(G_i - G_j)) U  S <- exp(G_C) S + (exp(G_C - G) K)^T U

A is nilpotent, so its inverse is a product of log2(C) factors: (I - A)(I + A^2)(I + A^4)(I + A^8) for C = 16. The state
space form is the same with U = dt V.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.device.kernels.triton.attention import METADATA

CHUNK = 16  # powers of A stay small enough for float32
CONV_TOKENS = 64


@triton.jit(do_not_specialize=["num_rows", "stride_table"], do_not_specialize_on_alignment=METADATA)
def _conv_kernel(
    out, x, weight, bias, pages, page_table, slot_mapping, query_start, kv_lens, num_rows, channels,
    stride_x, stride_table, stride_page,
    W: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr,
    STORE: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one row for BLOCK channels; row r owns the tiles from query_start[r] // TOKENS + r on.

    STORE: every row is one tile, which also leaves the row's last W - 1 inputs in its page.
    """
    pid = tl.program_id(1)
    low: tl.int32 = 0
    high = num_rows
    while high - low > 1:  # the last row whose first tile is not after ours
        middle = (low + high) // 2
        first_tile = tl.load(query_start + middle) // TOKENS + middle
        low = tl.where(first_tile <= pid, middle, low)
        high = tl.where(first_tile <= pid, high, middle)
    begin = tl.load(query_start + low)
    end = tl.load(query_start + low + 1)
    first = begin + (pid - (begin // TOKENS + low)) * TOKENS
    if first >= end:
        return
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < channels
    tokens = first + tl.arange(0, TOKENS)
    inside = (tokens < end)[:, None] & real[None, :]
    place = tokens.to(tl.int64)[:, None] * channels + at[None, :]
    slot = tl.load(slot_mapping + end - 1)
    if slot < 0:
        tl.store(out + place, tl.zeros((TOKENS, BLOCK), out.dtype.element_ty), mask=inside)
        return
    before = tl.load(kv_lens + low) - (end - begin)
    page = tl.load(page_table + low.to(tl.int64) * stride_table + tl.maximum(before - 1, 0) // PAGE).to(
        tl.int64
    )
    acc = tl.zeros((TOKENS, BLOCK), tl.float32)
    for j in tl.static_range(W):
        source = tokens - (W - 1) + j  # a token of this row, or one that the page remembers
        here = (source >= begin) & (tokens < end)
        kept = (source < begin) & (tokens < tl.where(before > 0, end, begin))  # nothing is kept of a new row
        values = tl.load(
            x + source.to(tl.int64)[:, None] * stride_x + at[None, :],
            mask=here[:, None] & real[None, :],
            other=0.0,
        )
        old = tl.load(
            pages + page * stride_page + (source - begin + W - 1)[:, None] * channels + at[None, :],
            mask=kept[:, None] & real[None, :], other=0.0,
        )  # fmt: skip
        w = tl.load(weight + at * W + j, mask=real, other=0.0)
        acc += (values.to(tl.float32) + old.to(tl.float32)) * w[None, :]
    if BIAS:
        acc += tl.load(bias + at, mask=real, other=0.0)[None, :]
    y = acc / (1.0 + tl.exp(-acc))
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)
    if STORE:
        _keep_inputs(
            x,
            pages,
            page,
            (slot // PAGE).to(tl.int64),
            before,
            begin,
            end,
            at,
            real,
            channels,
            stride_x,
            stride_page,
            W,
        )


@triton.jit
def _keep_inputs(
    x, pages, page, target, before, begin, end, at, real, channels, stride_x, stride_page, W: tl.constexpr
):
    """The last W - 1 inputs of a row into its page, of which some may come from the page before."""
    WPAD: tl.constexpr = triton.next_power_of_2(W - 1)
    index = tl.arange(0, WPAD)
    source = end - (W - 1) + index
    used = (index < W - 1)[:, None] & real[None, :]
    here = used & (source >= begin)[:, None]
    kept = used & (source < tl.where(before > 0, begin, begin - W))[:, None]
    values = tl.load(x + source.to(tl.int64)[:, None] * stride_x + at[None, :], mask=here, other=0.0)
    old = tl.load(
        pages + page * stride_page + (source - begin + W - 1)[:, None] * channels + at[None, :],
        mask=kept,
        other=0.0,
    )
    tl.debug_barrier()  # the page may be the same
    tl.store(
        pages + target * stride_page + index[:, None] * channels + at[None, :],
        values.to(pages.dtype.element_ty) + old.to(pages.dtype.element_ty),
        mask=used,
    )


@triton.jit(do_not_specialize=["stride_table"], do_not_specialize_on_alignment=METADATA)
def _conv_state_kernel(
    x, pages, page_table, slot_mapping, query_start, kv_lens, channels, stride_x, stride_table, stride_page,
    W: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What STORE does, for rows of several tiles: after all of them have read the page."""
    row = tl.program_id(1)
    begin = tl.load(query_start + row)
    end = tl.load(query_start + row + 1)
    if begin == end:
        return
    slot = tl.load(slot_mapping + end - 1)
    if slot < 0:
        return
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(kv_lens + row) - (end - begin)
    page = tl.load(page_table + row.to(tl.int64) * stride_table + tl.maximum(before - 1, 0) // PAGE).to(
        tl.int64
    )
    target = (slot // PAGE).to(tl.int64)
    _keep_inputs(
        x, pages, page, target, before, begin, end, at, at < channels, channels, stride_x, stride_page, W
    )


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, pages: Tensor, rows) -> Tensor:
    """``octavo.device.ops.recurrence.causal_conv`` on a GPU; channels of x and pages are contiguous."""
    num_tokens, channels = x.shape
    num_rows, width = rows.kv_lens.shape[0], weight.shape[1]
    one_tile = rows.max_query <= CONV_TOKENS
    tokens = 1 if rows.max_query == 1 else CONV_TOKENS
    block = 256 if tokens == 1 else 64
    out = torch.empty((num_tokens, channels), dtype=x.dtype, device=x.device)
    if rows.max_query > 1:
        out.zero_()  # padding behind the last row
    grid = (triton.cdiv(channels, block), num_tokens // tokens + num_rows)
    places = (rows.page_table, rows.slot_mapping, rows.query_start, rows.kv_lens)
    strides = (x.stride(0), rows.page_table.stride(0), pages.stride(0))
    _conv_kernel[grid](
        out, x, weight, weight if bias is None else bias, pages, *places, num_rows, channels, *strides,
        W=width, PAGE=rows.page_size, TOKENS=tokens, BLOCK=block, BIAS=bias is not None, STORE=one_tile,
    )  # fmt: skip
    if not one_tile:
        _conv_state_kernel[(triton.cdiv(channels, 256), num_rows)](
            x, pages, *places, channels, *strides, W=width, PAGE=rows.page_size, BLOCK=256
        )
    return out


@triton.jit
def _softplus(x):
    """log(1 + exp(x)); beyond 20 it is x, as torch has it."""
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit(do_not_specialize=["stride_table"], do_not_specialize_on_alignment=METADATA)
def _token_kernel(
    out, qkv, a, b, a_log, dt_bias, skip, states, page_table, slot_mapping, query_start, kv_lens,
    num_keys, num_heads, stride_qkv, stride_a, stride_table, stride_page, scale,
    DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, PAGE: tl.constexpr,
    DELTA: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Row r has one token at most: BV columns of one head's state are read, moved on and written."""
    row, head = tl.program_id(2), tl.program_id(1)
    begin = tl.load(query_start + row)
    if tl.load(query_start + row + 1) == begin:
        return
    values = tl.program_id(0) * BV + tl.arange(0, BV)
    real = values < DV
    place = out + begin.to(tl.int64) * num_heads * DV + head * DV + values
    slot = tl.load(slot_mapping + begin)
    if slot < 0:
        tl.store(place, tl.zeros((BV,), out.dtype.element_ty), mask=real)
        return
    before = tl.load(kv_lens + row) - 1
    page = tl.load(page_table + row.to(tl.int64) * stride_table + tl.maximum(before - 1, 0) // PAGE).to(
        tl.int64
    )
    keys = tl.arange(0, DKP)
    known = keys < DK
    inside = known[:, None] & real[None, :]
    own = head.to(tl.int64) * DK * DV + keys[:, None] * DV + values[None, :]
    state = tl.load(
        states + page * stride_page + own,
        mask=inside & (keys < tl.where(before > 0, DK, 0))[:, None],
        other=0.0,
    )
    token = qkv + begin.to(tl.int64) * stride_qkv
    key_head = head // (num_heads // num_keys)
    q = tl.load(token + key_head * DK + keys, mask=known, other=0.0).to(tl.float32)
    k = tl.load(token + (num_keys + key_head) * DK + keys, mask=known, other=0.0).to(tl.float32)
    v = tl.load(token + 2 * num_keys * DK + head * DV + values, mask=real, other=0.0).to(tl.float32)
    step = tl.load(a + begin.to(tl.int64) * stride_a + head).to(tl.float32) + tl.load(dt_bias + head)
    dt = _softplus(step)
    state = state * tl.exp(-tl.exp(tl.load(a_log + head)) * dt)
    if DELTA:
        q = q * (tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * scale)
        k = k * tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
        beta = tl.sigmoid(tl.load(b + begin.to(tl.int64) * stride_a + head).to(tl.float32))
        new = beta * (v - tl.sum(state * k[:, None], 0))
    else:
        new = dt * v
    state = state + k[:, None] * new[None, :]
    y = tl.sum(state * q[:, None], 0)
    if SKIP:
        y += tl.load(skip + head) * v
    tl.store(states + (slot // PAGE).to(tl.int64) * stride_page + own, state, mask=inside)
    tl.store(place, y.to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["stride_table"], do_not_specialize_on_alignment=METADATA)
def _chunk_kernel(
    out, qkv, a, b, a_log, dt_bias, skip, states, page_table, slot_mapping, query_start, kv_lens,
    num_keys, num_heads, stride_qkv, stride_a, stride_table, stride_page, scale,
    DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, PAGE: tl.constexpr,
    DELTA: tl.constexpr, SKIP: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Row r, one head, BV columns of its state, C tokens at a time (see above)."""
    row, head = tl.program_id(2), tl.program_id(1)
    begin = tl.load(query_start + row)
    end = tl.load(query_start + row + 1)
    if begin == end:
        return
    slot = tl.load(slot_mapping + end - 1)
    if slot < 0:
        return
    values = tl.program_id(0) * BV + tl.arange(0, BV)
    real = values < DV
    before = tl.load(kv_lens + row) - (end - begin)
    page = tl.load(page_table + row.to(tl.int64) * stride_table + tl.maximum(before - 1, 0) // PAGE).to(
        tl.int64
    )
    keys = tl.arange(0, DKP)
    known = keys < DK
    inside = known[:, None] & real[None, :]
    own = head.to(tl.int64) * DK * DV + keys[:, None] * DV + values[None, :]
    state = tl.load(
        states + page * stride_page + own,
        mask=inside & (keys < tl.where(before > 0, DK, 0))[:, None],
        other=0.0,
    )
    key_head = head // (num_heads // num_keys)
    rate = -tl.exp(tl.load(a_log + head))
    shift = tl.load(dt_bias + head)
    lanes = tl.arange(0, C)
    lower = lanes[:, None] > lanes[None, :]
    unit = tl.where(lanes[:, None] == lanes[None, :], 1.0, 0.0)
    for start in range(begin, end, C):
        tokens = start + lanes
        there = tokens < end
        line = qkv + tokens.to(tl.int64)[:, None] * stride_qkv
        q = tl.load(line + (key_head * DK + keys)[None, :], mask=there[:, None] & known[None, :], other=0.0)
        k = tl.load(
            line + ((num_keys + key_head) * DK + keys)[None, :],
            mask=there[:, None] & known[None, :],
            other=0.0,
        )
        v = tl.load(
            line + (2 * num_keys * DK + head * DV + values)[None, :],
            mask=there[:, None] & real[None, :],
            other=0.0,
        )
        q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
        rates = tokens.to(tl.int64) * stride_a + head
        dt = tl.where(there, _softplus(tl.load(a + rates, mask=there, other=0.0).to(tl.float32) + shift), 0.0)
        total = tl.cumsum(rate * dt, 0)
        last = tl.sum(rate * dt, 0)
        decay = tl.exp(tl.where(lower, total[:, None] - total[None, :], 0.0))  # on and above the diagonal: 1
        read = tl.exp(total)[:, None]
        if DELTA:
            q = q * (tl.rsqrt(tl.sum(q * q, 1) + 1e-6) * scale)[:, None]
            k = k * tl.rsqrt(tl.sum(k * k, 1) + 1e-6)[:, None]
            beta = tl.sigmoid(tl.load(b + rates, mask=there, other=0.0).to(tl.float32))[:, None]
            step = tl.dot(k, tl.trans(k), input_precision=PRECISION) * decay * beta
            power = tl.where(lower, step, 0.0)
            inverse = unit - power
            for _ in tl.static_range(3):
                power = tl.dot(power, power, input_precision="ieee")
                inverse = tl.dot(inverse, unit + power, input_precision="ieee")
            wrong = beta * (v - read * tl.dot(k, state, input_precision=PRECISION))
            new = tl.dot(inverse, wrong, input_precision=PRECISION)
        else:
            new = dt[:, None] * v
        seen = tl.dot(q, tl.trans(k), input_precision=PRECISION) * decay
        seen = tl.where(lanes[:, None] >= lanes[None, :], seen, 0.0)
        y = read * tl.dot(q, state, input_precision=PRECISION)
        y = tl.dot(seen, new, y, input_precision=PRECISION)
        if SKIP:
            y += tl.load(skip + head) * v
        place = out + tokens.to(tl.int64)[:, None] * (num_heads * DV) + (head * DV + values)[None, :]
        tl.store(place, y.to(out.dtype.element_ty), mask=there[:, None] & real[None, :])
        aged = tl.trans(k * tl.exp(last - total)[:, None])
        state = tl.dot(aged, new, state * tl.exp(last), input_precision=PRECISION)
    tl.store(states + (slot // PAGE).to(tl.int64) * stride_page + own, state, mask=inside)


def linear_recurrence(qkv, a, b, a_log, dt_bias, skip, states, rows, heads) -> Tensor:
    """``octavo.device.ops.recurrence.linear_recurrence`` on a GPU; a and b are columns of one matrix."""
    num_tokens, num_rows = qkv.shape[0], rows.kv_lens.shape[0]
    out = torch.empty((num_tokens, heads.num * heads.value_dim), dtype=qkv.dtype, device=qkv.device)
    single = rows.max_query == 1
    block = min(32 if not single else 64, triton.next_power_of_2(heads.value_dim))
    block = block if single else max(16, block)
    grid = (triton.cdiv(heads.value_dim, block), heads.num, num_rows)
    key_pad = max(16, triton.next_power_of_2(heads.key_dim))
    arguments = (
        out, qkv, a, a if b is None else b, a_log, dt_bias, a_log if skip is None else skip, states,
        rows.page_table, rows.slot_mapping, rows.query_start, rows.kv_lens, heads.num_keys, heads.num,
        qkv.stride(0), a.stride(0), rows.page_table.stride(0), states.stride(0), heads.key_dim**-0.5,
    )  # fmt: skip
    shape = {
        "DK": heads.key_dim, "DKP": key_pad, "DV": heads.value_dim, "BV": block, "PAGE": rows.page_size,
        "DELTA": b is not None, "SKIP": skip is not None,
    }  # fmt: skip
    if single:
        _token_kernel[grid](*arguments, **shape, num_warps=4)
    else:
        out.zero_()  # padding behind the last row
        precision = "ieee" if qkv.dtype == torch.float32 else "tf32"
        _chunk_kernel[grid](*arguments, **shape, C=CHUNK, PRECISION=precision, num_warps=4)
    return out


@triton.jit
def _gated_norm_kernel(
    out, y, gate, weight, eps, runs_of_weight, stride_gate,
    RUN: tl.constexpr, BLOCK: tl.constexpr, GATE_FIRST: tl.constexpr,
):  # fmt: skip
    """One run of one token."""
    token, run = tl.program_id(1).to(tl.int64), tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < RUN
    place = token * (tl.num_programs(0) * RUN) + run * RUN + at
    x = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + token * stride_gate + run * RUN + at, mask=inside, other=0.0).to(tl.float32)
    g = g / (1.0 + tl.exp(-g))
    if GATE_FIRST:
        x = x * g
    w = tl.load(weight + (run % runs_of_weight) * RUN + at, mask=inside, other=0.0)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / RUN + eps) * w
    if not GATE_FIRST:
        x = x * g
    tl.store(out + place, x.to(out.dtype.element_ty), mask=inside)


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, eps: float, run: int, gate_first: bool) -> Tensor:
    """``octavo.device.ops.recurrence.gated_norm`` on a GPU; values of a token are contiguous."""
    out = torch.empty_like(y)
    block = triton.next_power_of_2(run)
    _gated_norm_kernel[(y.shape[1] // run, y.shape[0])](
        out, y, gate, weight, eps, weight.numel() // run, gate.stride(0),
        RUN=run, BLOCK=block, GATE_FIRST=gate_first, num_warps=min(8, max(1, block // 256)),
    )  # fmt: skip
    return out
