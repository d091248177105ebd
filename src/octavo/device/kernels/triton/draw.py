"""The random draw in Triton: temperature, min_p, top_k and top_p without a sort of the vocabulary.

A first kernel scans chunks of every row in parallel: greatest logit, mass, and the winner of logit + noise over
the whole vocabulary. A second one settles each row. The set that the filters keep is always "everything at least
as likely as some threshold", so if the winner is kept it also wins among the kept; if it is not, neither is anything
less likely, and the next winner is sought above it (rejection as in FlashInfer's sampler, Ye et al. 2025, but with
fixed noise, so the result is that of the reference). Rows with top_k find their threshold first, among the few
tokens above the k-th greatest maximum of 64-token blocks.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.device.kernels.rows import FEW

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
WEYL = tl.constexpr(0x9E3779B9)  # the constants of octavo.device.ops.sampling
MIX_A = tl.constexpr(0x7FEB352D)
MIX_B = tl.constexpr(0x846CA68B)
NO_TOKEN = tl.constexpr(2147483647)
CHUNK = 4096  # vocabulary entries a program of the scan; the second kernel skips whole chunks
GRAIN = 64  # tokens that share one stored maximum
CAPACITY = 1024  # tokens above a top_k bound that are settled in registers
MAX_ROUNDS = 256  # far more than rejections can be; ends the loop on NaN
PER_ROW = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")
PER_CHUNK = ("maxima", "max_ids", "masses", "scores", "score_ids")
UNALIGNED = PER_ROW + PER_CHUNK  # slices whose alignment follows the number of rows: one kernel for all


@triton.jit
def _mix(x):
    """A bijection of uint32 (Wellons 2018)."""
    x = (x ^ (x >> 16)) * MIX_A
    x = (x ^ (x >> 15)) * MIX_B
    return x ^ (x >> 16)


@triton.jit
def _keys(seed, position):
    """Two uint32 keys of a row's noise."""
    first = _mix(_mix(seed.to(tl.uint32)) ^ position.to(tl.uint32))
    second = _mix(_mix((seed >> 32).to(tl.uint32) ^ WEYL) ^ (position >> 32).to(tl.uint32) ^ first)
    return first, second


@triton.jit
def _gumbel(ids, first, second):
    """Gumbel noise of token ids; see ``gumbel`` of the reference."""
    bits = _mix(_mix((ids.to(tl.uint32) * WEYL) ^ first) + second)
    uniform = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = uniform * (uniform * (uniform * 0.33333334 + 0.5) + 1.0)
    exponential = tl.where(uniform < 0.004, series, -tl.log(tl.maximum(1.0 - uniform, 3e-8)))
    return -tl.log(exponential)


@triton.jit
def _order(x):
    """An int64 that orders as the float does."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _value(order):
    """The float of ``_order``."""
    bits = order.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _winner(scores, ids):
    """(best score, lowest id that has it); NO_TOKEN where nothing compares."""
    best = tl.max(scores, 0)
    return best, tl.min(tl.where(scores == best, ids, NO_TOKEN), 0)


@triton.jit(do_not_specialize=["vocab"], do_not_specialize_on_alignment=UNALIGNED)
def _scan_kernel(
    maxima, max_ids, masses, scores, score_ids, grains, logits, temperature, seeds, positions, vocab, stride,
    CHUNK: tl.constexpr, GRAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One chunk of one row: greatest z and its id, sum of exp(z - greatest), winner of the draw, block maxima."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    heat = tl.load(temperature + row)
    inverse = 1.0 / tl.where(heat > 0, heat, 1.0)
    z = tl.load(logits + row * stride + at, mask=at < vocab, other=float("-inf")).to(tl.float32) * inverse
    best, best_id = _winner(z, at)
    place = row * tl.num_programs(1) + chunk
    tl.store(maxima + place, best)
    tl.store(max_ids + place, best_id)
    if heat > 0:
        shift = tl.where(best > -1.0e30, best, 0.0)
        tl.store(masses + place, tl.sum(tl.exp2((z - shift) * LOG2E), 0))
        first, second = _keys(tl.load(seeds + row), tl.load(positions + row))
        score, score_id = _winner(z + _gumbel(at, first, second), at)
        tl.store(scores + place, score)
        tl.store(score_ids + place, score_id)
        blocks = tl.max(tl.reshape(z, (CHUNK // GRAIN, GRAIN)), 1)
        tl.store(grains + place * (CHUNK // GRAIN) + tl.arange(0, CHUNK // GRAIN), blocks)


@triton.jit
def _mass_of(base, maxima, vocab, inverse, best, floor, pivot, CHUNK: tl.constexpr):
    """Sum of exp(z - best) over tokens with z >= floor and z > pivot."""
    lanes = tl.arange(0, CHUNK)
    mass = tl.zeros((CHUNK,), tl.float32)
    for chunk in range(tl.cdiv(vocab, CHUNK)):
        greatest = tl.load(maxima + chunk)
        if (greatest >= floor) & (greatest > pivot):
            at = chunk * CHUNK + lanes
            z = tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32) * inverse
            mass += tl.where((z >= floor) & (z > pivot), tl.exp2((z - best) * LOG2E), 0.0)
    return tl.sum(mass, 0)


@triton.jit
def _count_from(base, maxima, vocab, inverse, floor, CHUNK: tl.constexpr):
    """How many tokens have z >= floor."""
    lanes = tl.arange(0, CHUNK)
    count = tl.zeros((CHUNK,), tl.int32)
    for chunk in range(tl.cdiv(vocab, CHUNK)):
        if tl.load(maxima + chunk) >= floor:
            at = chunk * CHUNK + lanes
            z = tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32) * inverse
            count += (z >= floor).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _draw_above(base, maxima, vocab, inverse, floor, pivot, first, second, CHUNK: tl.constexpr):
    """Id of the winner of z + noise among tokens with z >= floor and z > pivot."""
    lanes = tl.arange(0, CHUNK)
    best = tl.full((CHUNK,), float("-inf"), tl.float32)
    best_id = tl.full((CHUNK,), NO_TOKEN, tl.int32)
    for chunk in range(tl.cdiv(vocab, CHUNK)):
        greatest = tl.load(maxima + chunk)
        if (greatest >= floor) & (greatest > pivot):
            at = chunk * CHUNK + lanes
            z = tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32) * inverse
            score = tl.where((z >= floor) & (z > pivot), z + _gumbel(at, first, second), float("-inf"))
            better = score > best
            best = tl.where(better, score, best)
            best_id = tl.where(better, at, best_id)
    _, winner = _winner(best, best_id)
    return winner


@triton.jit
def _kth_of(order, low, high, k):
    """A threshold in [low, high) that exactly the k greatest of ``order`` reach, or the k-th itself among equals."""
    while high - low > 1:
        middle = low + (high - low) // 2
        count = tl.sum((order >= middle).to(tl.int32), 0)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count > k, high, tl.where(count == k, middle + 1, middle))
    return low


@triton.jit
def _collect(values, ids, base, maxima, vocab, inverse, bound, CHUNK: tl.constexpr, CAPACITY: tl.constexpr):
    """Write the tokens with z >= bound to values and ids in order of id; returns how many there are."""
    lanes = tl.arange(0, CHUNK)
    found: tl.int32 = 0
    for chunk in range(tl.cdiv(vocab, CHUNK)):
        if tl.load(maxima + chunk) >= bound:
            at = chunk * CHUNK + lanes
            z = tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32) * inverse
            taken = (z >= bound).to(tl.int32)
            place = found + tl.cumsum(taken, 0) - 1
            fits = (taken > 0) & (place < CAPACITY)
            tl.store(values + place, z, mask=fits)
            tl.store(ids + place, at, mask=fits)
            found += tl.sum(taken, 0)
    tl.debug_barrier()
    return found


@triton.jit
def _settle_few(values, ids, found, k, p, floor, best, first, second, CAPACITY: tl.constexpr):
    """Filters and draw over the collected tokens, which hold at least the k most likely."""
    lanes = tl.arange(0, CAPACITY)
    z = tl.load(values + lanes, mask=lanes < found, other=float("-inf"))
    token = tl.load(ids + lanes, mask=lanes < found, other=NO_TOKEN)
    order = _order(z)
    high = _order(best) + 1
    kth = _kth_of(order, tl.min(tl.where(lanes < found, order, high), 0), high, k)
    floor = tl.maximum(floor, _value(kth))
    weight = tl.where(z >= floor, tl.exp2((z - best) * LOG2E), 0.0)
    if p < 1:
        need = tl.maximum(p * tl.sum(weight, 0), 1.0e-30)
        low = _order(floor)
        while high - low > 1:
            middle = low + (high - low) // 2
            enough = tl.sum(tl.where(order >= middle, weight, 0.0), 0) >= need
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        floor = tl.maximum(floor, _value(low))
    _, winner = _winner(tl.where(z >= floor, z + _gumbel(token, first, second), float("-inf")), token)
    return winner


@triton.jit(do_not_specialize=["vocab", "chunks"], do_not_specialize_on_alignment=UNALIGNED)
def _settle_kernel(
    tokens, maxima, max_ids, masses, scores, score_ids, grains, values, ids, logits,
    temperature, top_k, top_p, min_p, seeds, positions, vocab, chunks, stride,
    PAD: tl.constexpr, CHUNK: tl.constexpr, GRAIN: tl.constexpr, CAPACITY: tl.constexpr, ROUNDS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One row: merge its chunks, then accept the winner or look further up."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, PAD)
    there = lanes < chunks
    maxima += row * chunks
    greatest = tl.load(maxima + lanes, mask=there, other=float("-inf"))
    max_id = tl.load(max_ids + row * chunks + lanes, mask=there, other=NO_TOKEN)
    best, winner = _winner(greatest, max_id)
    heat = tl.load(temperature + row)
    if heat > 0:
        score = tl.load(scores + row * chunks + lanes, mask=there, other=float("-inf"))
        _, winner = _winner(score, tl.load(score_ids + row * chunks + lanes, mask=there, other=NO_TOKEN))
        k, p, least = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
        counted = (k > 0) & (k < vocab)
        if counted | (p < 1) | (least > 0):
            inverse = 1.0 / heat
            base = logits + row * stride
            first, second = _keys(tl.load(seeds + row), tl.load(positions + row))
            floor = best + tl.log2(tl.minimum(tl.maximum(least, 1e-30), 1.0)) * LN2
            floor = tl.where(least > 0, floor, float("-inf"))
            open_row = True
            if counted:
                bound = _order(float("-inf") + best * 0)
                blocks = chunks * (CHUNK // GRAIN)
                found = vocab
                if k <= CAPACITY:
                    block = tl.arange(0, PAD * (CHUNK // GRAIN))
                    top = tl.load(grains + row * blocks + block, mask=block < blocks, other=float("-inf"))
                    bound = _kth_of(_order(top), bound, _order(best) + 1, k)
                    kept = values + row * CAPACITY
                    kept_ids = ids + row * CAPACITY
                    found = _collect(
                        kept, kept_ids, base, maxima, vocab, inverse, _value(bound), CHUNK, CAPACITY
                    )
                    if found <= CAPACITY:
                        winner = _settle_few(
                            kept, kept_ids, found, k, p, floor, best, first, second, CAPACITY
                        )
                        open_row = False
                if open_row:  # many equals, or a large k: count in the row itself, one bit a pass
                    high = _order(best) + 1
                    while high - bound > 1:
                        middle = bound + (high - bound) // 2
                        count = _count_from(base, maxima, vocab, inverse, _value(middle), CHUNK)
                        bound = tl.where(count >= k, middle, bound)
                        high = tl.where(count > k, high, tl.where(count == k, middle + 1, middle))
                    floor = tl.maximum(floor, _value(bound))
            if open_row:
                need = float("inf") + best * 0
                if p < 1:
                    mass = tl.load(masses + row * chunks + lanes, mask=there, other=0.0)
                    total = tl.sum(mass * tl.exp2((greatest - best) * LOG2E), 0)
                    if floor > float("-inf"):
                        total = _mass_of(base, maxima, vocab, inverse, best, floor, float("-inf"), CHUNK)
                    need = tl.maximum(p * total, 1.0e-30)
                rounds: tl.int32 = 0
                while open_row & (rounds < ROUNDS):
                    rounds += 1
                    winner = tl.minimum(winner, vocab - 1)
                    pivot = tl.load(base + winner).to(tl.float32) * inverse
                    kept_mass = need
                    if pivot >= floor:
                        kept_mass = 0.0 * best
                        if p < 1:
                            kept_mass = _mass_of(base, maxima, vocab, inverse, best, floor, pivot, CHUNK)
                    open_row = kept_mass >= need
                    if open_row:
                        winner = _draw_above(base, maxima, vocab, inverse, floor, pivot, first, second, CHUNK)
    tl.store(tokens + row, tl.where((winner < 0) | (winner >= vocab), 0, winner).to(tl.int64))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    pdl: bool = False,
) -> Tensor:
    """``octavo.device.ops.sampling.sample`` on a GPU; rows of logits and the other columns are contiguous."""
    rows, vocab = logits.shape
    device = logits.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    if rows == 0:
        return tokens
    chunks = triton.cdiv(vocab, CHUNK)
    floats = torch.empty((3, rows, chunks), dtype=torch.float32, device=device)
    ints = torch.empty((2, rows, chunks), dtype=torch.int32, device=device)
    grains = torch.empty((rows, chunks * (CHUNK // GRAIN)), dtype=torch.float32, device=device)
    values = torch.empty((rows, CAPACITY), dtype=torch.float32, device=device)
    ids = torch.empty((rows, CAPACITY), dtype=torch.int32, device=device)
    maxima, masses, scores = floats.unbind(0)
    max_ids, score_ids = ints.unbind(0)
    pdl = pdl and rows <= FEW
    launch = {"launch_pdl": True} if pdl else {}
    _scan_kernel[(rows, chunks)](
        maxima, max_ids, masses, scores, score_ids, grains, logits, temperature, seeds, positions, vocab,
        logits.stride(0), CHUNK=CHUNK, GRAIN=GRAIN, PDL=pdl, num_warps=8, **launch,
    )  # fmt: skip
    _settle_kernel[(rows,)](
        tokens, maxima, max_ids, masses, scores, score_ids, grains, values, ids, logits,
        temperature, top_k, top_p, min_p, seeds, positions, vocab, chunks, logits.stride(0),
        PAD=triton.next_power_of_2(chunks), CHUNK=CHUNK, GRAIN=GRAIN, CAPACITY=CAPACITY, ROUNDS=MAX_ROUNDS, PDL=pdl,
        num_warps=16, **launch,
    )  # fmt: skip
    return tokens


sample_hopper = partial(sample, pdl=True)
