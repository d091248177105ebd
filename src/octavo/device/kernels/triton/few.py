"""Linear maps of up to 64 tokens in Triton: bound by reading the weight, so they take part in dependent launch.

A program owns BLOCK_N whole rows of the weight, the left operand of the tensor cores; all tokens are the right one. The
vendor's products are as fast alone, but a chain of kernels that all announce their followers early (programmatic dependent
launch) loses no time between them: a program starts while the kernel before it still runs, asks the second-level cache for
the first of its weights, which depend on nothing, and only then waits for its inputs.

    kernel before   ======computes=====|
    this one              start, prefetch weights . . wait |==products==|
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.device.kernels.rows import FEW
from octavo.device.kernels.triton.activation import KINDS, activate


@dataclass(frozen=True)
class Tile:
    """Launch shape: rows of the weight, inputs a turn, warps, pipeline depth, bytes of each row asked for before the wait."""

    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 5
    prefetch: int = 512


@triton.jit
def _ask(at, BYTES: tl.constexpr):
    """The second-level cache fetches BYTES from each address; nobody waits."""
    size = tl.zeros_like(at).to(tl.int32) + BYTES
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r", [at, size], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _few_kernel(
    out, x, weight, bias, token_scale, scale, M, N, K, stride_x,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr,
    SCALED: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """out [M, N] for BLOCK_N outputs. SCALED: times token_scale [M] and scale [N]. GATED: rows n and N + n of the weight are
    gate and up of output n."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = weight + tl.where(n < N, n, 0).to(tl.int64)[:, None] * K
    up = tl.cast(N, tl.int64) * K
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        _ask(rows.to(tl.int64, bitcast=True), PREFETCH)
        if GATED:
            _ask((rows + up).to(tl.int64, bitcast=True), PREFETCH)
        tl.extra.cuda.gdc_wait()
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    token = tl.where(m < M, m, 0)
    left = rows + k[None, :]
    right = x + token.to(tl.int64)[None, :] * stride_x + k[:, None]
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    others = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        values = tl.load(right + start)
        sums = tl.dot(tl.load(left + start), values, sums)
        if GATED:
            others = tl.dot(tl.load(left + up + start), values, others)
    kind = out.dtype.element_ty
    if SCALED:
        sums *= tl.load(scale + n, mask=n < N, other=0.0)[:, None] * tl.load(token_scale + token)[None, :]
    if BIAS:
        sums += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if GATED:
        # Both are rounded as if they had been stored.
        sums = activate(sums.to(kind).to(tl.float32), ACTIVATION) * others.to(kind).to(tl.float32)
    inside = (n < N)[:, None] & (m < M)[None, :]
    tl.store(out + m.to(tl.int64)[None, :] * N + n[:, None], sums.to(kind), mask=inside)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether these kernels compute x [T, K] times weight [N, K]: few tokens of 2 bytes or fewer a value, whole turns."""
    return (
        1 <= x.shape[0] <= FEW
        and x.element_size() <= 2
        and x.dtype == weight.dtype
        and x.stride(1) == 1
        and weight.is_contiguous()
        and weight.shape[1] * weight.element_size() % 256 == 0
        and weight.shape[1] * weight.element_size() >= 1024
    )


def tile_of(tokens: int, outputs: int, inputs: int, size: int, gated: bool = False) -> Tile:
    """What ``octavo.bench.gpu_few`` showed to be best in a chain of kernels; ``size`` = bytes a value."""
    if gated:
        return Tile(64, 256 // size, num_stages=5 if tokens <= 16 else 3)
    if tokens <= 16 and outputs > inputs and inputs * size % 512 == 0:
        return Tile(64, 512 // size, num_stages=3)
    return Tile(64, 256 // size)


def few(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scales: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None, *, tile: Tile | None = None, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """x [T, K] times weight [N, K] transposed, times ``scales`` ([T], [N]), plus bias [N]: [T, N] in ``dtype`` or x's."""
    tokens, inputs = x.shape
    out = torch.empty((tokens, weight.shape[0]), dtype=dtype or x.dtype, device=x.device)
    tile = tile or tile_of(tokens, weight.shape[0], inputs, x.element_size())
    _launch(out, x, weight, bias, scales, "", tile, pdl)
    return out


def gated_few(
    x: Tensor, weight: Tensor, activation: str, *, tile: Tile | None = None, pdl: bool = False
) -> Tensor:
    """``octavo.device.ops.linear.gated_linear`` of a few tokens."""
    tokens, inputs = x.shape
    outputs = weight.shape[0] // 2
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    tile = tile or tile_of(tokens, outputs, inputs, x.element_size(), gated=True)
    _launch(out, x, weight, None, None, activation, tile, pdl)
    return out


def _launch(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scales: tuple[Tensor, Tensor] | None, activation: str,
    tile: Tile, pdl: bool,
) -> None:  # fmt: skip
    tokens, outputs = out.shape
    token_scale, scale = scales or (None, None)
    _few_kernel[(triton.cdiv(outputs, tile.block_n),)](
        out, x, weight, bias, token_scale, scale, tokens, outputs, x.shape[1], x.stride(0),
        BLOCK_M=max(16, triton.next_power_of_2(tokens)), BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        STAGES=tile.num_stages, BIAS=bias is not None, SCALED=scales is not None, GATED=bool(activation),
        ACTIVATION=KINDS.get(activation, 2), PDL=pdl, PREFETCH=tile.prefetch, num_warps=tile.num_warps,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
