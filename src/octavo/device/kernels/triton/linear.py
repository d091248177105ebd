"""Linear maps of few tokens in Triton: bound by reading the weight once, so every byte of it should be in flight.

The weight is the tall side of the product (16 or more of its rows against at most 16 tokens), and a program owns
whole rows of it: no split of the sum, hence no second pass. With programmatic dependent launch a program asks for
its first weights while the kernel that computes x still runs: they do not depend on it.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

MAX_TOKENS = 16  # above it the vendor's library reads the weight as fast
LINE = 64  # 2-byte elements in a 128-byte line


@triton.jit
def _prefetch(at):
    """Ask for the lines at these addresses; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["tokens"])
def _skinny_kernel(
    out, x, weight, bias, tokens, stride_x, N: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, BIAS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of all tokens; BLOCK_T is 1 (a dot product) or 16 (a matrix product)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = weight + tl.where(n < N, n, 0).to(tl.int64)[:, None] * K
    if PDL:
        if AHEAD > 0:
            _prefetch(rows + (tl.arange(0, AHEAD) * 64)[None, :])
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if BLOCK_T == 1:
        sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            inside = start + k < K
            w = tl.load(rows + (start + k)[None, :], mask=inside[None, :], other=0.0)
            values = tl.load(x + start + k, mask=inside, other=0.0)
            sums += w.to(tl.float32) * values.to(tl.float32)[None, :]
        total = tl.sum(sums, 1)
        if BIAS:
            total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(out + n, total.to(out.dtype.element_ty), mask=n < N)
    else:
        t = tl.arange(0, BLOCK_T)
        acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            inside = start + k < K
            w = tl.load(rows + (start + k)[None, :], mask=inside[None, :], other=0.0)
            values = tl.load(
                x + t[None, :] * stride_x + (start + k)[:, None],
                mask=(t < tokens)[None, :] & inside[:, None],
                other=0.0,
            )
            acc = tl.dot(w, values, acc, input_precision=PRECISION)
        if BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        place = t[None, :] * N + n[:, None]
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=(t < tokens)[None, :] & (n < N)[:, None])


def tiles_for(tokens: int, outputs: int) -> tuple[int, int, int, int]:
    """(BLOCK_N, BLOCK_K, warps, stages) that keep every multiprocessor busy with a few programs."""
    if tokens == 1:
        return (8 if outputs < 16384 else 16, 512, 8, 4)
    return (16 if outputs <= 8192 else 32, 256, 4, 4)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, pdl: bool = False) -> Tensor:
    """``octavo.device.ops.linear.linear`` on a GPU; rows of x and weight are contiguous."""
    tokens, outputs = x.shape[0], weight.shape[0]
    if tokens > MAX_TOKENS or tokens == 0 or not weight.is_contiguous():
        return F.linear(x, weight, bias)
    return skinny(x, weight, bias, tiles_for(tokens, outputs), pdl and tokens == 1)


def skinny(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tiles: tuple[int, int, int, int],
    pdl: bool,
    ahead: int = 16,
) -> Tensor:
    """The kernel with given tiles, for at most ``MAX_TOKENS`` tokens; ``ahead``: lines of each row to prefetch."""
    tokens, size = x.shape
    outputs = weight.shape[0]
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    block_n, block_k, warps, stages = tiles
    launch = {"launch_pdl": True} if pdl else {}
    _skinny_kernel[(triton.cdiv(outputs, block_n),)](
        out, x, weight, bias, tokens, x.stride(0), N=outputs, K=size, BLOCK_T=1 if tokens == 1 else 16,
        BLOCK_N=block_n, BLOCK_K=block_k, AHEAD=min(ahead, triton.next_power_of_2(size // LINE + 1) // 2),
        BIAS=bias is not None, STAGES=stages, PRECISION="ieee" if x.element_size() == 4 else "tf32", PDL=pdl,
        num_warps=warps, **launch,
    )  # fmt: skip
    return out


linear_hopper = partial(linear, pdl=True)
