"""Linear maps with fp8 weights on a GPU, four ways by the number of tokens.

one            our own kernel: the weight is read once and widened in registers; x stays as it is
up to 64       where dependent launch exists: tokens quantized | ``few``, with the scales in its last lines
up to 511      tokens quantized | product without scales in the vendor's library | scales and bias in one pass
more           tokens quantized | product with a scale a row, which the library does as fast from there on

``octavo.bench.gpu_fp8`` times them; the bounds below are what it showed. Sizes that are no multiples of 16, which the
library does not take, are widened to a dense product.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from octavo.device.kernels.rows import ALIGNMENT, FEW, WIDE, Fp8Rows, Raw
from octavo.device.kernels.triton.few import few, takes
from octavo.device.kernels.triton.linear import Launch
from octavo.device.kernels.triton.quantize import empty_rows, quantized_row

ROW_WISE_FROM = 512  # tokens from which scales inside the product cost less than a pass over its result
VECTOR = Launch(8, 1024)


@triton.jit
def _vector_kernel(
    out, x, weight, scale, bias, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BIAS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of one token; a program owns whole rows of the weight."""
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
    total = tl.sum(sums, 1) * tl.load(scale + n, mask=n < N, other=0.0)
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + n, total.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def _quantize_kernel(out, scale, one, x, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One row: ``octavo.device.ops.fp8.quantize_rows``, to the bit; also writes one = 1."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    wide = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    values, unit = quantized_row(wide)
    tl.store(out + row * SIZE + at, values.to(out.dtype.element_ty), mask=inside)
    tl.store(scale + row, unit)
    if row == 0:
        tl.store(one, 1.0)


@triton.jit
def _scale_kernel(
    out, raw, token_scale, scale, bias, N: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """out[t, n] = raw[t, n] * token_scale[t] * scale[n] + bias[n] for BLOCK outputs of one token."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    value = tl.load(raw + token * N + n, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.load(token_scale + token) * tl.load(scale + n, mask=inside, other=0.0)
    if BIAS:
        value += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * N + n, value.to(out.dtype.element_ty), mask=inside)


def quantize_rows(x: Tensor, *, pdl: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """``octavo.device.ops.fp8.quantize_rows`` on a GPU, and the number 1 on it, for products without a scale.

    A row with a NaN is NaN by its scale alone.
    """
    rows, size = x.shape
    out, scale, one = empty_rows(rows, size, x.device)
    block = triton.next_power_of_2(size)
    _quantize_kernel[(rows,)](
        out, scale, one, x, x.stride(0), SIZE=size, BLOCK=block, PDL=pdl, num_warps=max(1, min(16, block // 256)),
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out, scale, one


def scaled(
    raw: Tensor, token_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product [T, N] of quantized values in ``dtype``: times both scales, plus the bias."""
    tokens, size = raw.shape
    out = raw if raw.dtype == dtype else torch.empty(raw.shape, dtype=dtype, device=raw.device)
    block = min(2048, triton.next_power_of_2(size))
    _scale_kernel[(tokens, triton.cdiv(size, block))](
        out, raw, token_scale, scale, bias, N=size, BLOCK=block, BIAS=bias is not None,
        num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip
    return out


def vector(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, launch: Launch = VECTOR, *,
    pdl: bool = False,
) -> Tensor:  # fmt: skip
    """``linear_fp8`` of one token without quantizing it; its row and the weight are contiguous."""
    outputs, size = weight.shape
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    _vector_kernel[(triton.cdiv(outputs, launch.block_n),)](
        out, x, weight, scale, bias, N=outputs, K=size, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k,
        BIAS=bias is not None, STAGES=launch.num_stages, PDL=pdl, num_warps=launch.num_warps,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out


def linear_fp8(
    x: Tensor | Fp8Rows, weight: Tensor, scale: Tensor, bias: Tensor | None = None, raw: bool = False, *,
    pdl: bool = False,
) -> Tensor | Raw:  # fmt: skip
    """``octavo.device.ops.fp8.linear_fp8`` on a GPU; the weight is contiguous."""
    tokens, outputs = x.shape[0], weight.shape[0]
    if tokens == 0:
        return torch.empty((0, outputs), dtype=x.dtype, device=weight.device)
    fits = outputs % ALIGNMENT == 0 and weight.shape[1] % ALIGNMENT == 0
    if tokens == 1 and not (fits and outputs >= WIDE):
        return vector(x, weight, scale, bias, pdl=pdl)
    if not fits:
        return F.linear(x, (weight.float() * scale.unsqueeze(1)).to(x.dtype), bias)
    if pdl and tokens <= FEW:
        quantized, token_scale, one = _rows(x, pdl=True)
        if takes(quantized, weight):
            return few(quantized, weight, bias, (token_scale, scale), x.dtype, pdl=True)
        x = Fp8Rows(quantized, token_scale, one, x.dtype)
    # The library returns row-wise scaled products in bfloat16 alone.
    if tokens >= ROW_WISE_FROM and x.dtype == torch.bfloat16:
        return row_wise(x, weight, scale, bias)
    return tensor_wise(x, weight, scale, bias, raw and bias is None)


def _rows(x: Tensor | Fp8Rows, *, pdl: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized values, scales and the number 1, of what may be quantized already."""
    return quantize_rows(x, pdl=pdl) if isinstance(x, Tensor) else (x.values, x.scale, x.one)


def row_wise(x: Tensor | Fp8Rows, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear_fp8`` by the library's product with a scale for each token and output; x is bfloat16."""
    quantized, token_scale, _ = _rows(x)
    y = torch._scaled_mm(
        quantized, weight.t(), scale_a=token_scale.unsqueeze(1), scale_b=scale.unsqueeze(0),
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
    return y if bias is None else y.add_(bias)


def tensor_wise(
    x: Tensor | Fp8Rows, weight: Tensor, scale: Tensor, bias: Tensor | None = None, raw: bool = False
) -> Tensor | Raw:
    """``linear_fp8`` by the library's product without scales, then both of them in a pass over the result (``raw``:
    without that pass)."""
    quantized, token_scale, one = _rows(x)
    # Sums of products up to 448^2 overflow float16.
    raw_type = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    product = torch._scaled_mm(
        quantized, weight.t(), scale_a=one, scale_b=one, out_dtype=raw_type, use_fast_accum=True
    )
    return (
        Raw(product, token_scale, scale, x.dtype)
        if raw
        else scaled(product, token_scale, scale, bias, x.dtype)
    )


linear_fp8_hopper = partial(linear_fp8, pdl=True)
