"""Linear maps with both operands in bytes: int8 with a scale a row, fp8 with a scale for 128 inputs.

Activations are quantized first, in a pass of their own. The weight is the left operand; where outputs are few, ranges of
inputs are separate programs, and the last to finish adds their sums, always in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.device.kernels.triton.fp8 import quantize_rows
from octavo.device.kernels.triton.split import finish

BLOCKS = (16, 32, 64, 128)  # tokens of a tile
BLOCK_K = 128
TARGET_PROGRAMS = 512  # a few on every multiprocessor of a large GPU
MAX_SPLITS = 16


@triton.jit
def _quantize_int8_kernel(out, scale, x, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One row: ``octavo.device.ops.int8.quantize_rows_int8``, to the bit."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    wide = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    unit = tl.maximum(tl.max(tl.abs(wide), 0), 1e-12) * (1.0 / 127.0)
    scaled = tl.div_rn(wide, unit)
    # Beside 1.5 * 2^23 only whole numbers survive, rounded to nearest even.
    whole = tl.minimum(tl.maximum(scaled + 12582912.0 - 12582912.0, -127.0), 127.0)
    tl.store(out + row * SIZE + at, whole.to(tl.int8), mask=inside)
    tl.store(scale + row, unit)


@triton.jit(do_not_specialize=["M", "steps", "per_split"])
def _bytes_kernel(
    out, sums, counters, x, x_scale, weight, scale, bias, M, N, K, steps, per_split, stride_out,
    GROUPS: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of BLOCK_M tokens over one range of inputs. x [M, K] and weight [N, K] are int8 (WHOLE) or fp8; scales
    x_scale [M] and scale [N], or with GROUPS x_scale [M, K / BLOCK_K] and scale [K / BLOCK_K, N]. SPLIT as in ``split.finish``."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    k = tl.arange(0, BLOCK_K)
    own_m, own_n = tl.where(m < M, m, 0), tl.where(n < N, n, 0)
    left = weight + own_n.to(tl.int64)[:, None] * K + k[None, :]
    right = x + own_m.to(tl.int64)[None, :] * K + k[:, None]
    groups = K // BLOCK_K
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    whole = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for step in tl.range(
        split * per_split, tl.minimum(split * per_split + per_split, steps), num_stages=STAGES
    ):
        if EVEN:
            a = tl.load(left + step * BLOCK_K)
            b = tl.load(right + step * BLOCK_K)
        else:
            inside = step * BLOCK_K + k < K
            a = tl.load(left + step * BLOCK_K, mask=inside[None, :], other=0)
            b = tl.load(right + step * BLOCK_K, mask=inside[:, None], other=0)
        if WHOLE:
            whole = tl.dot(a, b, whole, out_dtype=tl.int32)
        elif GROUPS:
            s = tl.load(scale + step * N + own_n)
            t = tl.load(x_scale + own_m * groups + step)
            acc += tl.dot(a, b) * s[:, None] * t[None, :]
        else:
            acc = tl.dot(a, b, acc)
    if WHOLE:
        acc = whole.to(tl.float32)
    if not GROUPS:
        acc = acc * tl.load(x_scale + own_m)[None, :] * tl.load(scale + own_n)[:, None]
    finish(acc, out, sums, counters, bias, m, n, M, N, stride_out, split, tl.num_programs(2), SPLIT, BIAS)


def quantize_rows_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """``octavo.device.ops.int8.quantize_rows_int8`` on a GPU; rows of x are contiguous."""
    rows, size = x.shape
    out = torch.empty((rows, size), dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(size)
    _quantize_int8_kernel[(rows,)](
        out, scale, x, x.stride(0), SIZE=size, BLOCK=block, num_warps=max(1, min(16, block // 256))
    )
    return out, scale


class BytesLinear:
    """A product of quantized operands; its first call runs every tile once, so that none compiles later."""

    def __init__(self) -> None:
        self.counters: Tensor | None = None

    def product(
        self,
        x: Tensor,
        x_scale: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """x [T, K] and weight [N, K] of bytes, with their scales: [T, N] in ``dtype``."""
        if self.counters is None:
            self.counters = torch.zeros(2 * TARGET_PROGRAMS, dtype=torch.int32, device=x.device)
            for block in BLOCKS:
                self._launch(block, x[:1], x_scale[:1], weight, scale, bias, dtype)
        block = next((size for size in BLOCKS if size >= x.shape[0]), BLOCKS[-1])
        return self._launch(block, x, x_scale, weight, scale, bias, dtype)

    def _launch(
        self,
        block: int,
        x: Tensor,
        x_scale: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        (tokens, size), outputs = x.shape, weight.shape[0]
        out = torch.empty((tokens, outputs), dtype=dtype, device=x.device)
        block_n, warps, stages = (64, 4, 5) if block <= 16 else (128, 4, 4) if block <= 64 else (128, 8, 3)
        steps = triton.cdiv(size, BLOCK_K)
        columns, rows = triton.cdiv(outputs, block_n), triton.cdiv(tokens, block)
        per_split = triton.cdiv(steps, max(1, min(MAX_SPLITS, steps, TARGET_PROGRAMS // (columns * rows))))
        ranges = triton.cdiv(steps, per_split)
        sums = out
        if ranges > 1:
            sums = torch.empty((ranges, tokens, outputs), dtype=torch.float32, device=x.device)
        _bytes_kernel[(rows, columns, ranges)](
            out, sums, self.counters, x, x_scale, weight, scale, bias, tokens, outputs, size, steps, per_split,
            out.stride(0), GROUPS=scale.dim() == 2, WHOLE=x.dtype == torch.int8, EVEN=size % BLOCK_K == 0,
            BLOCK_M=block, BLOCK_N=block_n, BLOCK_K=BLOCK_K, STAGES=stages, SPLIT=ranges > 1, BIAS=bias is not None,
            num_warps=warps,
        )  # fmt: skip
        return out


class LinearInt8(BytesLinear):
    """``octavo.device.ops.int8.linear_int8`` on a GPU; the weight is contiguous."""

    def __call__(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty((0, weight.shape[0]))
        return self.product(*quantize_rows_int8(x), weight, scale, bias, x.dtype)


class LinearFp8Block(BytesLinear):
    """``octavo.device.ops.fp8.linear_fp8_block`` on a GPU; the weight is contiguous."""

    def __call__(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        tokens, size = x.shape
        if tokens == 0:
            return x.new_empty((0, weight.shape[0]))
        values, token_scale, _ = quantize_rows(x.reshape(-1, BLOCK_K))
        groups = token_scale.view(tokens, size // BLOCK_K)
        return self.product(values.view(tokens, size), groups, weight, scale, bias, x.dtype)
