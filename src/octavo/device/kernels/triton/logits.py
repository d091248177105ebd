"""Changes to logits and questions about them in Triton: masks, penalties, token counts, log probabilities, argmax, NaN."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

IN_PROMPT = tl.constexpr(1 << 30)
COUNT_MASK = tl.constexpr((1 << 30) - 1)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
BLOCK = 4096
CHUNK = 4096  # vocabulary entries a program of a first pass scans


@triton.jit(
    do_not_specialize=["vocab"],
    do_not_specialize_on_alignment=["rows", "presence", "frequency", "repetition"],
)
def _penalize_kernel(
    logits, counts, rows, presence, frequency, repetition, vocab, stride_logits, stride_counts,
    stride_presence, stride_frequency, stride_repetition, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK entries of one row of logits, in place."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(rows + row).to(tl.int64)
    if source < 0:
        return
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    seen = tl.load(counts + source * stride_counts + at, mask=inside, other=0)
    generated = (seen & COUNT_MASK).to(tl.float32)
    place = logits + row * stride_logits + at
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.where(seen != 0, tl.load(repetition + row * stride_repetition), 1.0)
    x = tl.where(x > 0, x / factor, x * factor)
    x -= tl.load(frequency + row * stride_frequency) * generated
    x -= tl.where(generated > 0, tl.load(presence + row * stride_presence), 0.0)
    tl.store(place, x.to(logits.dtype.element_ty), mask=inside)


def penalize(
    logits: Tensor, counts: Tensor, rows: Tensor, presence: Tensor, frequency: Tensor, repetition: Tensor
) -> None:
    """``octavo.device.ops.sampling.penalize`` on a GPU."""
    num_rows, vocab = logits.shape
    if num_rows == 0 or counts.shape[0] == 0:
        return
    _penalize_kernel[(num_rows, triton.cdiv(vocab, BLOCK))](
        logits, counts, rows, presence, frequency, repetition, vocab, logits.stride(0), counts.stride(0),
        presence.stride(0), frequency.stride(0), repetition.stride(0), BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["rows", "tokens"])
def _count_kernel(counts, rows, tokens, num_rows, stride_counts, BLOCK: tl.constexpr):
    """counts[row, token] += 1 for BLOCK rows; atomic, as two of them may name the same row."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + at, mask=at < num_rows, other=-1).to(tl.int64)
    token = tl.load(tokens + at, mask=at < num_rows, other=0)
    tl.atomic_add(counts + row * stride_counts + token, 1, mask=row >= 0)


def count_tokens(counts: Tensor, rows: Tensor, tokens: Tensor) -> None:
    """``octavo.device.ops.sampling.count_tokens`` on a GPU."""
    if tokens.shape[0]:
        grid = (triton.cdiv(tokens.shape[0], 128),)
        _count_kernel[grid](counts, rows, tokens, tokens.shape[0], counts.stride(0), BLOCK=128, num_warps=4)


@triton.jit(do_not_specialize=["vocab"], do_not_specialize_on_alignment=["tokens"])
def _logprob_kernel(logprobs, ranks, logits, tokens, vocab, stride, BLOCK: tl.constexpr):
    """Log probability and rank of one token in one row, in one pass."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    chosen = tl.load(base + tl.load(tokens + row)).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    # Relative to the chosen logit the sum could overflow: keep a running maximum in each lane.
    best = tl.full((BLOCK,), -1.0e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    above = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(base + start + lanes, mask=start + lanes < vocab, other=float("-inf")).to(tl.float32)
        new_best = tl.maximum(best, x)
        total = total * tl.exp2((best - new_best) * LOG2E) + tl.exp2((x - new_best) * LOG2E)
        above += (x > chosen).to(tl.int32)
        best = new_best
    most = tl.max(best, 0)
    mass = tl.sum(total * tl.exp2((best - most) * LOG2E), 0)
    tl.store(logprobs + row, chosen - most - tl.log2(mass) * LN2)
    tl.store(ranks + row, tl.sum(above, 0).to(tl.int64) + 1)


def logprobs_of(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """``octavo.device.ops.sampling.logprobs_of`` on a GPU."""
    num_rows, vocab = logits.shape
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    ranks = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows:
        _logprob_kernel[(num_rows,)](
            logprobs, ranks, logits, tokens, vocab, logits.stride(0), BLOCK=BLOCK, num_warps=8
        )
    return logprobs, ranks


@triton.jit(do_not_specialize=["vocab"])
def _argmax_chunk_kernel(values, ids, logits, vocab, stride, CHUNK: tl.constexpr):
    """Greatest value of one chunk of one row and the lowest id that has it; -1 where the chunk holds a NaN."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * stride + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    best = tl.max(x, 0)
    place = row * tl.num_programs(1) + chunk
    tl.store(values + place, best)
    lowest = tl.min(tl.where(x == best, at, 2147483647), 0)
    broken = tl.max((x != x).to(tl.int32), 0)  # noqa: PLR0124 (only a NaN differs from itself)
    tl.store(ids + place, tl.where(broken > 0, -1, lowest))


@triton.jit(do_not_specialize=["chunks", "vocab"])
def _argmax_merge_kernel(tokens, bad, values, ids, chunks, vocab, PAD: tl.constexpr):
    """The best chunk of one row; the first among equals holds the lowest id. ``bad``: whether any held a NaN."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PAD)
    x = tl.load(values + row * chunks + at, mask=at < chunks, other=float("-inf"))
    token = tl.load(ids + row * chunks + at, mask=at < chunks, other=2147483647)
    lowest = tl.min(tl.where(x == tl.max(x, 0), token, 2147483647), 0)
    # Where there are NaN nothing may compare: still a token.
    tl.store(tokens + row, tl.where((lowest >= 0) & (lowest < vocab), lowest, 0).to(tl.int64))
    tl.store(bad + row, tl.min(token, 0) < 0)


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """``octavo.device.ops.sampling.greedy`` on a GPU; rows of logits are contiguous."""
    num_rows, vocab = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    bad = torch.empty(num_rows, dtype=torch.bool, device=logits.device)
    if num_rows == 0:
        return tokens, bad
    chunks = triton.cdiv(vocab, CHUNK)
    values = torch.empty((num_rows, chunks), dtype=torch.float32, device=logits.device)
    ids = torch.empty((num_rows, chunks), dtype=torch.int32, device=logits.device)
    _argmax_chunk_kernel[(num_rows, chunks)](
        values, ids, logits, vocab, logits.stride(0), CHUNK=CHUNK, num_warps=4
    )
    _argmax_merge_kernel[(num_rows,)](
        tokens, bad, values, ids, chunks, vocab, PAD=triton.next_power_of_2(chunks), num_warps=1
    )
    return tokens, bad


@triton.jit(do_not_specialize=["vocab"])
def _nan_kernel(found, logits, vocab, stride, BLOCK: tl.constexpr):
    """Whether one row holds a NaN."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    broken = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits + row * stride + start + lanes, mask=start + lanes < vocab, other=0.0).to(
            tl.float32
        )
        broken |= (x != x).to(tl.int32)  # noqa: PLR0124 (only a NaN differs from itself)
    tl.store(found + row, tl.max(broken, 0) != 0)


def nan_rows(logits: Tensor) -> Tensor:
    """``octavo.device.ops.sampling.nan_rows`` on a GPU; rows of logits are contiguous."""
    num_rows, vocab = logits.shape
    found = torch.empty(num_rows, dtype=torch.bool, device=logits.device)
    if num_rows:
        _nan_kernel[(num_rows,)](found, logits, vocab, logits.stride(0), BLOCK=2 * BLOCK, num_warps=16)
    return found


@triton.jit(do_not_specialize=["vocab", "num_words"], do_not_specialize_on_alignment=["rows", "words"])
def _mask_kernel(logits, rows, words, vocab, num_words, stride, BLOCK: tl.constexpr):
    """Forbid tokens among BLOCK of one row."""
    index = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    word = tl.load(words + index * num_words + at // 32, mask=inside, other=-1)
    place = logits + tl.load(rows + index) * stride + at
    tl.store(place, float("-inf"), mask=inside & (((word >> (at % 32)) & 1) == 0))


def mask_logits(logits: Tensor, rows: Tensor, words: Tensor) -> None:
    """``octavo.device.ops.sampling.mask_logits`` on a GPU; rows of logits and words are contiguous."""
    if len(rows):
        vocab = logits.shape[1]
        _mask_kernel[(len(rows), triton.cdiv(vocab, BLOCK))](
            logits, rows, words, vocab, words.shape[1], logits.stride(0), BLOCK=BLOCK, num_warps=4
        )
