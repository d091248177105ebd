"""Hyper-connections in Triton: a product of few outputs whose long sum is cut into ranges, and two passes over the streams.

Each program of the passes computes a token's few weights anew and moves BLOCK of its channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.device.kernels.triton.ranges import num_ranges

BLOCK = 1024
TOKENS = 16  # of one tile of the product
INPUTS = 64  # of the long sum, a turn
RANGES = ((64, 64), (512, 8))


@triton.jit(do_not_specialize=["tokens"])
def _logits_kernel(
    out, squares, streams, fn, tokens, norm_eps,
    K: tl.constexpr, KPAD: tl.constexpr, SIZE: tl.constexpr, RANGE: tl.constexpr, TOKENS: tl.constexpr,
    INPUTS: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One range of the sums of TOKENS tokens: products with K rows of fn, and squares; with one range the result."""
    token, split = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1)
    row, lanes = tl.arange(0, KPAD), tl.arange(0, INPUTS)
    real = token < tokens
    at = token.to(tl.int64)
    sums = tl.zeros((TOKENS, KPAD), tl.float32)
    square = tl.zeros((TOKENS,), tl.float32)
    for start in range(split * RANGE, min(split * RANGE + RANGE, SIZE), INPUTS):
        here = start + lanes
        inside = here < SIZE
        x = tl.load(
            streams + at[:, None] * SIZE + here[None, :], mask=real[:, None] & inside[None, :], other=0.0
        )
        x = x.to(tl.float32)
        w = tl.load(
            fn + row[:, None] * SIZE + here[None, :], mask=(row < K)[:, None] & inside[None, :], other=0.0
        )
        sums = tl.dot(x, tl.trans(w), sums, input_precision=PRECISION)
        square += tl.sum(x * x, 1)
    mask = real[:, None] & (row < K)[None, :]
    if SPLITS == 1:
        sums = sums * tl.rsqrt(square / SIZE + norm_eps)[:, None]
        tl.store(out + at[:, None] * K + row[None, :], sums, mask=mask)
    else:
        place = at * SPLITS + split
        tl.store(out + place[:, None] * K + row[None, :], sums, mask=mask)
        tl.store(squares + place, square, mask=real)


@triton.jit
def _sum_kernel(
    out, sums, squares, norm_eps,
    K: tl.constexpr, KPAD: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The ranges of one token together."""
    token = tl.program_id(0).to(tl.int64)
    row, splits = tl.arange(0, KPAD), tl.arange(0, SPLITS)
    place = token * SPLITS + splits
    parts = tl.load(sums + place[:, None] * K + row[None, :], mask=(row < K)[None, :], other=0.0)
    square = tl.sum(tl.load(squares + place), 0)
    tl.store(out + token * K + row, tl.sum(parts, 0) * tl.rsqrt(square / SIZE + norm_eps), mask=row < K)


def hyper_logits(streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """``octavo.device.ops.hyper.hyper_logits`` on a GPU; both are contiguous."""
    tokens, outputs = streams.shape[0], fn.shape[0]
    size = fn.shape[1]
    out = torch.empty((tokens, outputs), dtype=torch.float32, device=streams.device)
    if tokens == 0:
        return out
    tiles = triton.cdiv(tokens, TOKENS)
    splits = num_ranges(tokens, RANGES)
    sums, squares = out, out
    if splits > 1:
        sums = torch.empty((tokens, splits, outputs), dtype=torch.float32, device=streams.device)
        squares = torch.empty((tokens, splits), dtype=torch.float32, device=streams.device)
    shape = {"K": outputs, "KPAD": max(16, triton.next_power_of_2(outputs)), "SIZE": size, "SPLITS": splits}
    _logits_kernel[(tiles, splits)](
        sums, squares, streams, fn, tokens, norm_eps, **shape, RANGE=triton.cdiv(size, splits * INPUTS) * INPUTS,
        TOKENS=TOKENS, INPUTS=INPUTS, PRECISION="ieee" if streams.element_size() == 4 else "tf32x3", num_warps=4,
    )  # fmt: skip
    if splits > 1:
        _sum_kernel[(tokens,)](out, sums, squares, norm_eps, **shape, num_warps=4)
    return out


@triton.jit
def _sigmoid(x):
    """Without overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, small) / (1.0 + small)


@triton.jit
def _enter_kernel(
    out, weights, streams, logits, base, scale, eps,
    N: tl.constexpr, NPAD: tl.constexpr, E: tl.constexpr, TURNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the branch reads; the program of the first channels also writes the weights of the way back."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.arange(0, NPAD)
    inside = n < N
    known = logits + token * (N * (N + 2))
    read = tl.load(known + n, mask=inside, other=0.0) * tl.load(scale) + tl.load(
        base + n, mask=inside, other=0.0
    )
    read = tl.where(inside, _sigmoid(read) + eps, 0.0)
    at = part * BLOCK + tl.arange(0, BLOCK)
    tile = (token * N + n[:, None]) * E + at[None, :]
    values = tl.load(streams + tile, mask=inside[:, None] & (at < E)[None, :], other=0.0).to(tl.float32)
    entered = tl.sum(values * read[:, None], 0)
    tl.store(out + token * E + at, entered.to(out.dtype.element_ty), mask=at < E)
    if part == 0:
        write = tl.load(known + N + n, mask=inside, other=0.0) * tl.load(scale + 1)
        write = 2.0 * _sigmoid(write + tl.load(base + N + n, mask=inside, other=0.0))
        target = weights + token * (N * (N + 1))
        tl.store(target + n, write, mask=inside)
        pair = inside[:, None] & inside[None, :]
        cell = n[:, None] * N + n[None, :]
        mix = tl.load(known + 2 * N + cell, mask=pair, other=0.0) * tl.load(scale + 2)
        mix = tl.where(pair, mix + tl.load(base + 2 * N + cell, mask=pair, other=0.0), float("-inf"))
        mix = tl.exp(mix - tl.max(tl.where(pair, mix, -1.0e30), 1)[:, None])
        mix = tl.where(pair, mix, 0.0)
        mix = tl.where(pair, mix / tl.where(inside, tl.sum(mix, 1), 1.0)[:, None] + eps, 0.0)
        mix = mix / (tl.sum(mix, 0) + eps)[None, :]
        for _ in range(TURNS - 1):
            mix = mix / (tl.sum(mix, 1) + eps)[:, None]
            mix = mix / (tl.sum(mix, 0) + eps)[None, :]
        tl.store(target + N + cell, mix, mask=pair)


def hyper_enter(
    streams: Tensor, logits: Tensor, base: Tensor, scale: Tensor, iterations: int, eps: float
) -> tuple[Tensor, Tensor]:
    """``octavo.device.ops.hyper.hyper_enter`` on a GPU; all are contiguous."""
    tokens, n, size = streams.shape
    out = torch.empty((tokens, size), dtype=streams.dtype, device=streams.device)
    weights = torch.empty((tokens, n * (n + 1)), dtype=torch.float32, device=streams.device)
    if tokens:
        _enter_kernel[(tokens, triton.cdiv(size, BLOCK))](
            out, weights, streams, logits, base, scale, eps, N=n, NPAD=triton.next_power_of_2(n), E=size,
            TURNS=iterations, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out, weights


@triton.jit
def _leave_kernel(
    streams, answer, weights, stride_answer,
    N: tl.constexpr, NPAD: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All streams' share of BLOCK channels, in place."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, at = tl.arange(0, NPAD), part * BLOCK + tl.arange(0, BLOCK)
    inside = (n < N)[:, None] & (at < E)[None, :]
    tile = (token * N + n[:, None]) * E + at[None, :]
    values = tl.load(streams + tile, mask=inside, other=0.0).to(tl.float32)
    new = tl.load(answer + token * stride_answer + at, mask=at < E, other=0.0).to(tl.float32)
    known = weights + token * (N * (N + 1))
    for j in tl.static_range(N):
        share = tl.load(known + N + n * N + j, mask=n < N, other=0.0)
        mixed = tl.sum(values * share[:, None], 0) + tl.load(known + j) * new
        tl.store(streams + (token * N + j) * E + at, mixed.to(streams.dtype.element_ty), mask=at < E)


def hyper_leave(streams: Tensor, answer: Tensor, weights: Tensor) -> None:
    """``octavo.device.ops.hyper.hyper_leave`` on a GPU; streams and weights are contiguous."""
    tokens, n, size = streams.shape
    if tokens:
        _leave_kernel[(tokens, triton.cdiv(size, BLOCK))](
            streams, answer, weights, answer.stride(0), N=n, NPAD=triton.next_power_of_2(n), E=size, BLOCK=BLOCK,
            num_warps=4,
        )  # fmt: skip
