"""Linear maps with fp8 weights on a GPU, three ways by the number of tokens.

1-4            our own kernel: the weight is read once, widened in registers; x stays as it is
up to ~1000    tokens quantized | product without scales in the vendor's library | scales and bias in one pass
more           tokens quantized | product with a scale a row, which the library does as fast from there on

Sizes that are no multiples of 16, which the library does not take, are widened to a dense product.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

SKINNY = 4  # most tokens of our own kernel
ROW_WISE_FROM = 1024  # tokens from which scales inside the product cost less than a pass over its result
ALIGNMENT = 16  # of both sizes of a weight that the library's product takes
FP8 = torch.float8_e4m3fn


@triton.jit(do_not_specialize=["count"])
def _skinny_kernel(
    out, x, weight, scale, bias, count, N: tl.constexpr, K: tl.constexpr, FEW: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of one token, or (FEW) of ``count`` <= 4; a program owns whole rows of the weight."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = weight + tl.where(n < N, n, 0).to(tl.int64)[:, None] * K
    unit = tl.load(scale + n, mask=n < N, other=0.0)
    shift = tl.zeros((BLOCK_N,), tl.float32)
    if BIAS:
        shift = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    # Rows past the last token are the first one's again, and are not stored.
    second = tl.where(count > 1, K, 0)
    third = tl.where(count > 2, 2 * K, 0)
    fourth = tl.where(count > 3, 3 * K, 0)
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    # One sum a token by name: a third dimension would send the weight through shared memory again.
    sums_b = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    sums_c = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    sums_d = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        inside = start + k < K
        w = tl.load(rows + (start + k)[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        line = x + start + k
        sums += w * tl.load(line, mask=inside, other=0.0).to(tl.float32)[None, :]
        if FEW:
            sums_b += w * tl.load(line + second, mask=inside, other=0.0).to(tl.float32)[None, :]
            sums_c += w * tl.load(line + third, mask=inside, other=0.0).to(tl.float32)[None, :]
            sums_d += w * tl.load(line + fourth, mask=inside, other=0.0).to(tl.float32)[None, :]
    place = out + n
    kind = out.dtype.element_ty
    tl.store(place, (tl.sum(sums, 1) * unit + shift).to(kind), mask=n < N)
    if FEW:
        tl.store(place + N, (tl.sum(sums_b, 1) * unit + shift).to(kind), mask=n < tl.where(count > 1, N, 0))
        tl.store(
            place + 2 * N, (tl.sum(sums_c, 1) * unit + shift).to(kind), mask=n < tl.where(count > 2, N, 0)
        )
        tl.store(
            place + 3 * N, (tl.sum(sums_d, 1) * unit + shift).to(kind), mask=n < tl.where(count > 3, N, 0)
        )


@triton.jit
def _quantize_kernel(out, scale, one, x, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One row: ``octavo.device.ops.fp8.quantize_rows``, to the bit; also writes one = 1."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    wide = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(wide), 0)
    unit = tl.div_rn(tl.maximum(largest, 1e-12), 448.0)
    scaled = tl.div_rn(wide, unit)
    scaled = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
    # Rounded here to 3 bits of mantissa, nearest even, so that the conversion is exact wherever it runs: beside
    # 1.5 * 2^20 times its power of two (2^-6 for subnormals) only those bits of a value survive.
    power = (scaled.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    beside = tl.maximum(power, 0.015625) * 1572864.0
    tl.store(out + row * SIZE + at, (scaled + beside - beside).to(out.dtype.element_ty), mask=inside)
    # max() passes over NaN, the sum does not.
    tl.store(scale + row, unit + tl.sum(wide * 0.0, 0))
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


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``octavo.device.ops.fp8.quantize_rows`` on a GPU, and the number 1 on it, for products without a scale.

    A row with a NaN is NaN by its scale alone.
    """
    rows, size = x.shape
    out = torch.empty((rows, size), dtype=FP8, device=x.device)
    numbers = torch.empty(rows + 4, dtype=torch.float32, device=x.device)  # scales from an aligned address on
    scale, one = numbers[4:], numbers[0]
    block = triton.next_power_of_2(size)
    warps = max(1, min(16, block // 256))
    _quantize_kernel[(rows,)](out, scale, one, x, x.stride(0), SIZE=size, BLOCK=block, num_warps=warps)
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


def skinny(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, pdl: bool = False
) -> Tensor:
    """``linear_fp8`` of 1 to 4 tokens, without quantizing them; rows of x and weight are contiguous."""
    tokens, (outputs, size) = x.shape[0], weight.shape
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    # One class for 2-4 tokens: it is compiled once, and reading the weight is what takes the time.
    block_k = 1024 if tokens == 1 else 512
    block = 8 if outputs < 16384 or tokens > 1 else 16
    launch = {"launch_pdl": True} if pdl else {}
    _skinny_kernel[(triton.cdiv(outputs, block),)](
        out, x.contiguous(), weight, scale, bias, tokens, N=outputs, K=size, FEW=tokens > 1, BLOCK_N=block,
        BLOCK_K=block_k, BIAS=bias is not None, STAGES=4, PDL=pdl, num_warps=8, **launch,
    )  # fmt: skip
    return out


def linear_fp8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, pdl: bool = False
) -> Tensor:
    """``octavo.device.ops.fp8.linear_fp8`` on a GPU; the weight is contiguous."""
    tokens = x.shape[0]
    if tokens == 0:
        return torch.empty((0, weight.shape[0]), dtype=x.dtype, device=x.device)
    if tokens <= SKINNY:
        return skinny(x, weight, scale, bias, pdl=pdl and tokens == 1)
    if weight.shape[0] % ALIGNMENT or weight.shape[1] % ALIGNMENT:
        return F.linear(x, (weight.float() * scale.unsqueeze(1)).to(x.dtype), bias)
    # The library returns row-wise scaled products in bfloat16 alone.
    if tokens >= ROW_WISE_FROM and x.dtype == torch.bfloat16:
        return row_wise(x, weight, scale, bias)
    return tensor_wise(x, weight, scale, bias)


def row_wise(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear_fp8`` by the library's product with a scale for each token and output; x is bfloat16."""
    quantized, token_scale, _ = quantize_rows(x)
    y = torch._scaled_mm(
        quantized, weight.t(), scale_a=token_scale.unsqueeze(1), scale_b=scale.unsqueeze(0),
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
    return y if bias is None else y.add_(bias)


def tensor_wise(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear_fp8`` by the library's product without scales, then both of them in a pass over the result."""
    quantized, token_scale, one = quantize_rows(x)
    # Sums of products up to 448^2 overflow float16.
    raw_type = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    raw = torch._scaled_mm(
        quantized, weight.t(), scale_a=one, scale_b=one, out_dtype=raw_type, use_fast_accum=True
    )
    return scaled(raw, token_scale, scale, bias, x.dtype)


linear_fp8_hopper = partial(linear_fp8, pdl=True)
