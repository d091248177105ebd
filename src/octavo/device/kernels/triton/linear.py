"""Linear maps of one token in Triton: bound by reading the weight once, so every byte of it should be in flight.

A program owns whole rows of the weight, so the sum is not split and there is no second pass. More tokens take the tensor
cores: ``few`` where dependent launch makes a chain of our own kernels faster, the vendor's library elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from octavo.device.kernels.triton.activation import KINDS, act_mul, activate
from octavo.device.kernels.triton.few import few, gated_few, takes


@dataclass(frozen=True)
class Launch:
    """Launch shape of a one-token kernel: rows of the weight and inputs a turn, warps, software pipeline depth."""

    block_n: int
    block_k: int
    num_warps: int = 8
    num_stages: int = 4


def vector_launch(outputs: int) -> Launch:
    """Of ``linear``: a few programs on every multiprocessor."""
    return Launch(8 if outputs < 16384 else 16, 512)


def gated_launch(outputs: int) -> Launch:
    """Of ``gated_linear``: as many rows of the weight a program as ``linear`` takes, half of them gates."""
    return Launch(4 if outputs < 8192 else 8, 512)


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
    if x.shape[0] == 1 and weight.is_contiguous():
        return vector(x, weight, bias, vector_launch(weight.shape[0]), pdl=pdl)
    return few(x, weight, bias, pdl=True) if pdl and takes(x, weight) else F.linear(x, weight, bias)


def vector(x: Tensor, weight: Tensor, bias: Tensor | None, launch: Launch, *, pdl: bool = False) -> Tensor:
    """``linear`` of one token; ``octavo.bench.gpu_vector`` compares launch shapes."""
    outputs, size = weight.shape
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    _vector_kernel[(triton.cdiv(outputs, launch.block_n),)](
        out, x, weight, bias, N=outputs, K=size, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, BIAS=bias is not None,
        STAGES=launch.num_stages, PDL=pdl, num_warps=launch.num_warps, **({"launch_pdl": True} if pdl else {}),
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
    if x.shape[0] == 1 and weight.is_contiguous():
        return gated_vector(x, weight, activation, gated_launch(weight.shape[0] // 2), pdl=pdl)
    if pdl and takes(x, weight):
        return gated_few(x, weight, activation, pdl=True)
    return act_mul(F.linear(x, weight), activation, pdl=pdl)


def gated_vector(x: Tensor, weight: Tensor, activation: str, launch: Launch, *, pdl: bool = False) -> Tensor:
    """``gated_linear`` of one token."""
    outputs, size = weight.shape[0] // 2, weight.shape[1]
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    _gated_kernel[(triton.cdiv(outputs, launch.block_n),)](
        out, x, weight, N=outputs, K=size, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k,
        ACTIVATION=KINDS.get(activation, 2), STAGES=launch.num_stages, PDL=pdl, num_warps=launch.num_warps,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out


linear_hopper = partial(linear, pdl=True)
gated_linear_hopper = partial(gated_linear, pdl=True)
