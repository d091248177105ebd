"""Routing and experts in Triton: one program a token chooses; then tokens are sorted by expert, then two grouped products (Gale et al. 2022).

Nothing here asks the host: grids are upper bounds, and blocks past the last used one return at once. So a step can be
captured whatever the router chooses.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024  # choices that a program of the sort looks at together
BLOCKS = (16, 32, 64, 128)
SCORINGS = {"softmax": 0, "sigmoid": 1, "softmax_top_k": 2, "sqrt_softplus": 3}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "swiglu_clamped": 3}


@triton.jit
def _sigmoid(x):
    """Without overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, small) / (1.0 + small)


@triton.jit
def _route_kernel(
    ids, weights, logits, correction,
    E: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, KEPT: tl.constexpr, SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr, SCALE: tl.constexpr, CORRECTION: tl.constexpr, GROUPS: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_BEST: tl.constexpr,
):  # fmt: skip
    """One token: scores of all E experts in one tile, then TOP_K times the best; KEPT and BLOCK are powers of two."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < E
    scores = tl.load(logits + token * E + at, mask=inside, other=float("-inf")).to(tl.float32)
    if SCORING == 0:
        scores = tl.exp(scores - tl.max(scores, 0))
        scores = scores / tl.sum(scores, 0)
    elif SCORING == 1:
        scores = _sigmoid(scores)
    elif SCORING == 3:
        scores = tl.sqrt(tl.maximum(scores, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(scores))))
    choice = scores
    if CORRECTION:
        choice += tl.load(correction + at, mask=inside, other=0.0)
    choice = tl.where(inside, choice, float("-inf"))
    if GROUPS > 1:
        group = at // (E // GROUPS)
        groups = tl.arange(0, GROUPS_BLOCK)
        worth = tl.full((GROUPS_BLOCK,), float("-inf"), tl.float32)
        for index in tl.static_range(GROUPS):
            members = tl.where(group == index, choice, float("-inf"))
            total = tl.max(members, 0)
            if E // GROUPS > 1 and GROUP_BEST > 1:
                total += tl.max(tl.where(at == tl.argmax(members, 0), float("-inf"), members), 0)
            worth = tl.where(groups == index, total, worth)
        kept = at < 0
        for _ in tl.static_range(TOP_GROUPS):
            best_group = tl.argmax(worth, 0)
            kept = kept | (group == best_group)
            worth = tl.where(groups == best_group, float("-inf"), worth)
        choice = tl.where(kept, choice, float("-inf"))
    places = tl.arange(0, KEPT)
    chosen = tl.zeros((KEPT,), tl.int32)
    shares = tl.full((KEPT,), float("-inf") if SCORING == 2 else 0.0, tl.float32)
    for index in tl.static_range(TOP_K):
        best = tl.argmax(choice, 0)
        chosen = tl.where(places == index, best, chosen)
        shares = tl.where(places == index, tl.sum(tl.where(at == best, scores, 0.0), 0), shares)
        choice = tl.where(at == best, float("-inf"), choice)
    if SCORING == 2:
        shares = tl.exp(shares - tl.max(shares, 0))
        shares = shares / tl.sum(shares, 0)
    elif RENORMALIZE:
        shares = shares / (tl.sum(shares, 0) + 1e-20)
    valid = places < TOP_K
    tl.store(ids + token * TOP_K + places, chosen.to(tl.int64), mask=valid)
    tl.store(weights + token * TOP_K + places, shares * SCALE, mask=valid)


@triton.jit(do_not_specialize=["count"])
def _sort_kernel(
    rows, block_expert, num_blocks, ids, count,
    EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program an expert: lists its choices, padded to whole blocks with ``count``, behind those of lower experts.

    ids [count]: expert of each choice. rows [max_blocks * BLOCK], block_expert [max_blocks], num_blocks [1].
    """
    expert = tl.program_id(0)
    at = tl.arange(0, CHUNK)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, count, CHUNK):
        chosen = tl.load(ids + start + at, mask=start + at < count, other=EXPERTS).to(tl.int32)
        counts += tl.histogram(chosen, BINS)
    bins = tl.arange(0, BINS)
    blocks = tl.where(bins < EXPERTS, (counts + BLOCK - 1) // BLOCK, 0)
    first = tl.sum(tl.where(bins < expert, blocks, 0))
    own = tl.sum(tl.where(bins == expert, blocks, 0))
    used = tl.sum(tl.where(bins == expert, counts, 0))
    if expert == 0:
        tl.store(num_blocks, tl.sum(blocks))
    place = rows + first * BLOCK
    for start in range(0, count, CHUNK):
        chosen = tl.load(ids + start + at, mask=start + at < count, other=EXPERTS).to(tl.int32)
        mine = (chosen == expert).to(tl.int32)
        tl.store(place + tl.cumsum(mine, 0) - 1, start + at, mask=mine > 0)
        place += tl.sum(mine)
    rest = used + tl.arange(0, BLOCK)
    tl.store(rows + first * BLOCK + rest, tl.zeros((BLOCK,), tl.int32) + count, mask=rest < own * BLOCK)
    for index in range(own):
        tl.store(block_expert + first + index, expert)


@triton.jit
def _gated(gate, up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """``octavo.device.ops.moe.gated`` on two tiles."""
    if ACTIVATION == 0:
        if LIMIT > 0:
            gate = tl.minimum(gate, LIMIT)
            up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return gate * _sigmoid(gate) * up
    elif ACTIVATION == 1:
        return gate * _sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    elif ACTIVATION == 2:
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    else:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return gate * _sigmoid(ALPHA * gate) * (up + 1.0)


@triton.jit(do_not_specialize=["count"])
def _grouped_kernel(
    out, x, weight, bias, scale, rows, block_expert, num_blocks, count,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    SCALED: tl.constexpr, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[row] = x[row // TOP_K] times the row's expert, for BLOCK_M rows of one expert and BLOCK_N outputs.

    x [., K]; weight [E, N, K], or GATED [E, 2 N, K] whose halves are combined; bias as its rows; SCALED: times
    scale[row]. Programs of the same outputs follow each other, so that blocks of one expert share its weight.
    """
    block = tl.program_id(0)
    if block >= tl.load(num_blocks):
        return
    expert = tl.load(block_expert + block).to(tl.int64)
    row = tl.load(rows + block * BLOCK_M + tl.arange(0, BLOCK_M))
    live = row < count
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = n < N
    left = x + tl.where(live, row // TOP_K, 0).to(tl.int64)[:, None] * K + k[None, :]
    first = expert * (2 * N if GATED else N)
    right = weight + (first + tl.where(inside, n, 0))[None, :] * K + k[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    others = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a = tl.load(left + start, mask=live[:, None], other=0.0)
            b = tl.load(right + start)
        else:
            a = tl.load(left + start, mask=live[:, None] & (start + k < K)[None, :], other=0.0)
            b = tl.load(right + start, mask=(start + k < K)[:, None], other=0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
        if GATED:
            if K % BLOCK_K == 0:
                c = tl.load(right + N * K + start)
            else:
                c = tl.load(right + N * K + start, mask=(start + k < K)[:, None], other=0.0)
            others = tl.dot(a, c, others, input_precision="ieee")
    if BIAS:
        sums += tl.load(bias + first + n, mask=inside, other=0.0).to(tl.float32)[None, :]
        if GATED:
            others += tl.load(bias + first + N + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        sums = _gated(sums, others, ACTIVATION, ALPHA, LIMIT)
    if SCALED:
        sums *= tl.load(scale + row, mask=live, other=0.0)[:, None]
    place = out + tl.where(live, row, 0).to(tl.int64)[:, None] * N + n[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])


def route(
    logits: Tensor,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    correction: Tensor | None = None,
    group_best: int = 2,
) -> tuple[Tensor, Tensor]:
    """``octavo.device.ops.moe.route`` on a GPU; logits are contiguous."""
    tokens, num = logits.shape
    ids = torch.empty((tokens, top_k), dtype=torch.int64, device=logits.device)
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    if tokens == 0:
        return ids, weights
    block = triton.next_power_of_2(num)
    _route_kernel[(tokens,)](
        ids, weights, logits, correction, E=num, BLOCK=block, TOP_K=top_k, KEPT=triton.next_power_of_2(top_k),
        SCORING=SCORINGS[scoring], RENORMALIZE=renormalize, SCALE=scale, CORRECTION=correction is not None,
        GROUPS=groups, GROUPS_BLOCK=triton.next_power_of_2(groups), TOP_GROUPS=top_groups, GROUP_BEST=group_best,
        num_warps=1 if block <= 256 else 4,
    )  # fmt: skip
    return ids, weights


def sorted_rows(ids: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choices ids [T, K] by expert: rows [max_blocks * block] int32, expert of each block, number of blocks used.

    A row is an index into the flat ids; T * K stands for padding.
    """
    count = ids.numel()
    max_blocks = count // block + min(num_experts, count)  # each expert met has at most one block not full
    rows = torch.empty(max_blocks * block, dtype=torch.int32, device=ids.device)
    block_expert = torch.empty(max_blocks, dtype=torch.int32, device=ids.device)
    num_blocks = torch.empty(1, dtype=torch.int32, device=ids.device)
    _sort_kernel[(num_experts,)](
        rows, block_expert, num_blocks, ids, count, EXPERTS=num_experts,
        BINS=triton.next_power_of_2(num_experts + 1), BLOCK=block, CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip
    return rows, block_expert, num_blocks


def block_rows(count: int, num_experts: int) -> int:
    """Rows of a block: about what an expert gets on average, within what tensor cores take."""
    return max(BLOCKS[0], min(BLOCKS[-1], triton.next_power_of_2(max(1, count // num_experts))))


Order = tuple[Tensor, Tensor, Tensor]  # what ``sorted_rows`` gives


class GroupedExperts:
    """``octavo.device.ops.moe.experts`` on a GPU; all tensors are contiguous.

    The first call runs one token through every block size, so that none compiles later, whatever a step's size.
    """

    def __init__(self, blocks: tuple[int, ...] = BLOCKS) -> None:
        self.blocks = blocks
        self.ready = False

    def __call__(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        gate_up: Any,
        down: Any,
        activation: str,
        alpha: float = 1.0,
        limit: float = 0.0,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        partial: bool = False,
    ) -> Tensor:
        if ids.numel() == 0:
            return torch.zeros_like(x)
        options = {"ACTIVATION": ACTIVATIONS[activation], "ALPHA": alpha, "LIMIT": limit}
        matrices = (gate_up, down, gate_up_bias, down_bias)
        if not self.ready:
            for block in self.blocks:
                self._two_products(block, x[:1], ids[:1], weights[:1], matrices, options, partial)
            self.ready = True
        block = min(block_rows(ids.numel(), self.sizes(down, x)[0]), self.blocks[-1])
        return self._two_products(block, x, ids, weights, matrices, options, partial)

    def _two_products(
        self,
        block: int,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        matrices: tuple[Any, Any, Tensor | None, Tensor | None],
        options: dict[str, Any],
        partial: bool,
    ) -> Tensor:
        gate_up, down, gate_up_bias, down_bias = matrices
        (tokens, top_k), hidden = ids.shape, x.shape[1]
        num_experts, inner = self.sizes(down, x)
        count = tokens * top_k
        order = sorted_rows(ids, num_experts, block)
        middle = torch.empty((count, inner), dtype=x.dtype, device=x.device)
        # Choices of experts that are not here belong to no block; their rows stay as they are.
        out = (torch.zeros if partial else torch.empty)((count, hidden), dtype=x.dtype, device=x.device)
        self.product(block, middle, x, gate_up, gate_up_bias, None, order, count, top_k, options)
        self.product(block, out, middle, down, down_bias, weights, order, count, 1, options)
        return out.view(tokens, top_k, hidden).sum(1)

    @staticmethod
    def sizes(down: Any, x: Tensor) -> tuple[int, int]:
        """Number of experts, and their inner size."""
        return down.shape[0], down.shape[2]

    @staticmethod
    def product(
        block: int, out: Tensor, x: Tensor, weight: Any, bias: Tensor | None, share: Tensor | None, order: Order, count: int,
        top_k: int, options: dict[str, Any],
    ) -> None:  # fmt: skip
        """One grouped product into out [count, .]: gated from x [tokens, .], or with ``share`` its rows times those."""
        gated = share is None
        block_n = 64 if gated or block < 64 else 128
        _grouped_kernel[(order[1].numel(), triton.cdiv(out.shape[1], block_n))](
            out, x, weight, bias, share, *order, count, N=out.shape[1], K=x.shape[1], TOP_K=top_k, GATED=gated,
            BIAS=bias is not None, SCALED=not gated, BLOCK_M=block, BLOCK_N=block_n, BLOCK_K=64, **options,
            num_warps=8 if block >= 128 else 4, num_stages=3 if block >= 64 else 4,
        )  # fmt: skip
