"""Linear maps of one token in Triton: bound by reading the weight once, so every byte of it should be in flight.

A program owns whole rows of the weight, so the sum is not split and there is no second pass. From two tokens on the
vendor's library reads the weight as fast and has tensor cores to spare.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from octavo.device.kernels.triton.activation import KINDS, act_mul, activate


@triton.jit
def _vector_kernel(
    out, x, weight, bias, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BIAS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of one token."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = weight + tl.where(n < N, n, 0).to(tl.int64)[:, None] * K
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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, pdl: bool = False) -> Tensor:
    """``octavo.device.ops.linear.linear`` on a GPU; a row of x is contiguous."""
    if x.shape[0] != 1 or not weight.is_contiguous():
        return F.linear(x, weight, bias)
    outputs, size = weight.shape
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    block = 8 if outputs < 16384 else 16  # a few programs on every multiprocessor
    launch = {"launch_pdl": True} if pdl else {}
    _vector_kernel[(triton.cdiv(outputs, block),)](
        out, x, weight, bias, N=outputs, K=size, BLOCK_N=block, BLOCK_K=512, BIAS=bias is not None, STAGES=4,
        PDL=pdl, num_warps=8, **launch,
    )  # fmt: skip
    return out


@triton.jit
def _gated_kernel(
    out, x, weight, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ACTIVATION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of one token: gate rows n and up rows N + n of the weight side by side."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = weight + tl.where(n < N, n, 0).to(tl.int64)[:, None] * K
    gates = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    ups = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        inside = start + k < K
        at = rows + (start + k)[None, :]
        values = tl.load(x + start + k, mask=inside, other=0.0).to(tl.float32)[None, :]
        gates += tl.load(at, mask=inside[None, :], other=0.0).to(tl.float32) * values
        ups += tl.load(at + N * K, mask=inside[None, :], other=0.0).to(tl.float32) * values
    kind = out.dtype.element_ty
    gate = tl.sum(gates, 1).to(kind).to(tl.float32)
    up = tl.sum(ups, 1).to(kind).to(tl.float32)
    tl.store(out + n, (activate(gate, ACTIVATION) * up).to(kind), mask=n < N)


def gated_linear(x: Tensor, weight: Tensor, activation: str, *, pdl: bool = False) -> Tensor:
    """``octavo.device.ops.linear.gated_linear`` on a GPU; a row of x is contiguous."""
    if x.shape[0] != 1 or not weight.is_contiguous():
        return act_mul(F.linear(x, weight), activation, pdl=pdl)
    outputs, size = weight.shape[0] // 2, weight.shape[1]
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    block = 4 if outputs < 8192 else 8  # as many rows of the weight a program as ``linear`` takes
    launch = {"launch_pdl": True} if pdl else {}
    _gated_kernel[(triton.cdiv(outputs, block),)](
        out, x, weight, N=outputs, K=size, BLOCK_N=block, BLOCK_K=512, ACTIVATION=KINDS.get(activation, 2), STAGES=4,
        PDL=pdl, num_warps=8, **launch,
    )  # fmt: skip
    return out


linear_hopper = partial(linear, pdl=True)
gated_linear_hopper = partial(gated_linear, pdl=True)
