"""Experts over packed codes in Triton: the blocks of ``moe``, with the products of ``packed``.

As there, grids are upper bounds and nothing asks the host, so that a step can be captured whatever the router chooses.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from octavo.device.kernels.triton.moe import GroupedExperts, Order, _gated
from octavo.device.kernels.triton.packed import SKINNY, constants, packed_products, tile

BLOCKS = (16, 32, 64)
LARGE_BLOCKS = (*BLOCKS, 128)


@triton.jit(do_not_specialize=["count", "M"])
def _experts_kernel(
    out, x, words, high, scale, outer, bias, share, rows, block_expert, num_blocks, count, M, N, K, runs, stride_x,
    W: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, CODE: tl.constexpr, SCALES: tl.constexpr,
    IN_WORD: tl.constexpr, OFFSET: tl.constexpr, HALF: tl.constexpr, FEW: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, TOP_K: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out[row] = x[row // TOP_K] times the row's expert, for BLOCK_M rows of one expert and BLOCK_N of its ROWS outputs.

    The weight has N rows in all, an expert ROWS of them, or GATED 2 ROWS, whose halves are combined.
    """
    block = tl.program_id(0)
    if block >= tl.load(num_blocks):
        return
    expert = tl.load(block_expert + block)
    row = tl.load(rows + block * BLOCK_M + tl.arange(0, BLOCK_M))
    live = row < count
    m = tl.where(live, row // TOP_K, -1)
    local = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = local < ROWS
    first = expert * (2 * ROWS if GATED else ROWS)
    n = first + tl.where(inside, local, 0)
    sums = packed_products(
        tl.zeros((BLOCK_N, BLOCK_M), tl.float32), x, words, high, scale, outer, m, n, M, N, K, stride_x, 0, runs,
        W, BITS, HIGH, GROUP, CODE, SCALES, IN_WORD, OFFSET, HALF, FEW, EVEN, BLOCK_M, BLOCK_N, STAGES,
    )  # fmt: skip
    if BIAS:
        sums += tl.load(bias + n).to(tl.float32)[:, None]
    if GATED:
        others = packed_products(
            tl.zeros((BLOCK_N, BLOCK_M), tl.float32), x, words, high, scale, outer, m, n + ROWS, M, N, K, stride_x, 0, runs,
            W, BITS, HIGH, GROUP, CODE, SCALES, IN_WORD, OFFSET, HALF, FEW, EVEN, BLOCK_M, BLOCK_N, STAGES,
        )  # fmt: skip
        if BIAS:
            others += tl.load(bias + n + ROWS).to(tl.float32)[:, None]
        sums = _gated(sums, others, ACTIVATION, ALPHA, LIMIT)
    if SCALED:
        sums *= tl.load(share + row, mask=live, other=0.0)[None, :]
    place = out + tl.where(live, row, 0).to(tl.int64)[None, :] * ROWS + local[:, None]
    tl.store(place, sums.to(out.dtype.element_ty), mask=inside[:, None] & live[None, :])


class GroupedPackedExperts(GroupedExperts):
    """``octavo.device.ops.moe.experts_packed`` on a GPU; all tensors are contiguous."""

    def __init__(self, blocks: tuple[int, ...] = BLOCKS) -> None:
        super().__init__(blocks)

    @staticmethod
    def sizes(down: Any, x: Tensor) -> tuple[int, int]:
        """See ``GroupedExperts``."""
        return down.outputs // x.shape[1], down.inputs

    @staticmethod
    def product(
        block: int, out: Tensor, x: Tensor, weight: Any, bias: Tensor | None, share: Tensor | None, order: Order, count: int,
        top_k: int, options: dict[str, Any],
    ) -> None:  # fmt: skip
        """See ``GroupedExperts``."""
        block_n, warps, stages = tile(block)
        _experts_kernel[(order[1].numel(), triton.cdiv(out.shape[1], block_n))](
            out, x, weight.words, weight.high, weight.scale, weight.outer, bias, share, *order, count, x.shape[0],
            weight.outputs, weight.inputs, weight.words.shape[0], x.stride(0), **constants(weight.layout), FEW=block <= SKINNY,
            EVEN=weight.inputs % weight.layout.run == 0, ROWS=out.shape[1], TOP_K=top_k, GATED=share is None,
            BIAS=bias is not None, SCALED=share is not None, BLOCK_M=block, BLOCK_N=block_n, STAGES=stages,
            num_warps=warps, **options,
        )  # fmt: skip


GroupedPackedExpertsHopper = partial(GroupedPackedExperts, LARGE_BLOCKS)  # larger tiles for many tokens
