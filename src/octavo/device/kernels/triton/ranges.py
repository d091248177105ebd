"""What kernels share that attend over ranges of keys: the online softmax in base 2, and the merge of ranges.

A range of (token, head) pair ``flat`` that is not the only one leaves its unnormalized sum in sums [pairs, SPLITS, SIZE], and
its maximum and total in stats [pairs, SPLITS, 2], all float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)  # stands for -inf as a running maximum: differences of it stay numbers


def num_ranges(tokens: int, classes: tuple[tuple[int, int], ...]) -> int:
    """Ranges for a step of so many tokens: those of the first of ``classes`` (up to so many tokens, ranges) that it fits.

    Few classes, because each is a kernel that must be compiled before the server is ready (see ``runner.warm``).
    """
    return next((ranges for most, ranges in classes if tokens <= most), 1)


def scratch(out: Tensor, pairs: int, splits: int, size: int) -> tuple[Tensor, Tensor]:
    """(sums, stats) for the ranges of so many pairs; ``out``, which nobody reads, where each has one range."""
    if splits == 1:
        return out, out
    sums = torch.empty((pairs, splits, size), dtype=torch.float32, device=out.device)
    return sums, torch.empty((pairs, splits, 2), dtype=torch.float32, device=out.device)


@triton.jit
def weighed(scores, best, total):
    """Weights of one more block of scores [M, N]; what shrinks sums so far; the new maximum and total [M]."""
    new_best = tl.maximum(best, tl.max(scores, 1))
    weights = tl.exp2(scores - new_best[:, None])
    shrink = tl.exp2(best - new_best)
    return weights, shrink, new_best, total * shrink + tl.sum(weights, 1)


@triton.jit
def range_size(keys, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr):
    """Keys in each of the ranges: whole blocks."""
    return tl.cdiv(tl.cdiv(keys, BLOCK_N), SPLITS) * BLOCK_N


@triton.jit
def leave_range(
    sums, stats, acc, best, total, flat, split, dims, real, inside, SIZE: tl.constexpr, SPLITS: tl.constexpr
):
    """Write one range of a tile of pairs ``flat``; ``inside`` masks acc, ``real`` its rows."""
    place = flat * SPLITS + split
    tl.store(sums + place[:, None] * SIZE + dims[None, :], acc, mask=inside)
    tl.store(stats + place * 2, best, mask=real)
    tl.store(stats + place * 2 + 1, total, mask=real)


@triton.jit
def merge_ranges(
    sums, stats, flat, ranges, dims, floor, SIZE: tl.constexpr, SIZE_PAD: tl.constexpr, SPLITS: tl.constexpr
):
    """The sum of one pair's ranges, each weighted by its own maximum; their total; the highest maximum, at least ``floor``."""
    splits = tl.arange(0, SPLITS)
    used = splits < ranges
    best = tl.load(stats + (flat * SPLITS + splits) * 2, mask=used, other=LOWEST)
    total = tl.load(stats + (flat * SPLITS + splits) * 2 + 1, mask=used, other=0.0)
    highest = tl.maximum(tl.max(best, 0), floor)
    weight = tl.exp2(best - highest)
    merged = tl.zeros((SIZE_PAD,), tl.float32)
    for index in range(ranges):
        share = tl.sum(tl.where(splits == index, weight, 0.0), 0)
        part = tl.load(sums + (flat * SPLITS + index) * SIZE + dims, mask=dims < SIZE, other=0.0)
        merged += part * share
    return merged, tl.sum(total * weight, 0), highest
