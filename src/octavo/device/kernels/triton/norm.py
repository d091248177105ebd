"""RMSNorm in Triton, alone and fused with the residual addition: one program a row, one pass over memory."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.device.kernels.rows import FEW, Fp8Rows, Raw
from octavo.device.kernels.triton.quantize import empty_rows, quantized_row


@triton.jit
def _norm_kernel(
    out, x, residual, weight, eps, stride_x, stride_residual, token_scale, scale, out_scale, one,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, RAW: tl.constexpr, QUANTIZE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[row] = x[row] / rms(x[row]) * weight; with ADD, residual[row] += x[row] first and that is normed.

    RAW: x is a product that still wants token_scale[row] * scale. QUANTIZE: out is fp8 with out_scale[row]; one = 1.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    wide = tl.load(x + row * stride_x + at, mask=inside, other=0.0).to(tl.float32)
    if RAW:
        wide = wide * tl.load(token_scale + row) * tl.load(scale + at, mask=inside, other=0.0)
        wide = wide.to(residual.dtype.element_ty).to(tl.float32)
    if ADD:
        place = residual + row * stride_residual + at
        wide += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        total = wide.to(residual.dtype.element_ty)  # the norm sees what is stored
        tl.store(place, total, mask=inside)
        wide = total.to(tl.float32)
    rms = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    if QUANTIZE:
        normed = (wide * rms * w).to(residual.dtype.element_ty).to(tl.float32)
        values, unit = quantized_row(normed)
        tl.store(out + row * SIZE + at, values.to(out.dtype.element_ty), mask=inside)
        tl.store(out_scale + row, unit)
        if row == 0:
            tl.store(one, 1.0)
    else:
        tl.store(out + row * SIZE + at, (wide * rms * w).to(out.dtype.element_ty), mask=inside)


def warps_for(block: int) -> int:
    """Warps for a row of ``block`` elements: 16 bytes of half precision a thread, at most 16 warps."""
    return max(1, min(16, block // 256))


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, pdl: bool = False) -> Tensor:
    """``octavo.device.ops.norm.rms_norm`` on a GPU."""
    size = x.shape[-1]
    flat = x.reshape(-1, size)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(out, flat, flat, weight, eps, False, pdl)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, pdl: bool = False) -> Tensor:
    """``octavo.device.ops.norm.add_rms_norm`` on a GPU; rows of x and residual [T, E] are contiguous."""
    out = torch.empty(residual.shape, dtype=residual.dtype, device=x.device)
    _launch(out, x, residual, weight, eps, True, pdl)
    return out


def add_rms_norm_fp8(
    x: Tensor | Raw, residual: Tensor, weight: Tensor, eps: float, quantize: bool, *, pdl: bool = False
) -> Tensor | Fp8Rows:
    """``octavo.device.ops.fp8.add_rms_norm_fp8`` on a GPU; rows are contiguous."""
    raw = None if isinstance(x, Tensor) else x
    if raw is None and not quantize:
        return add_rms_norm(x, residual, weight, eps, pdl=pdl)
    values = x if raw is None else raw.values
    if not quantize:
        out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
        _launch(out, values, residual, weight, eps, True, pdl, raw)
        return out
    out, scale, one = empty_rows(*residual.shape, residual.device)
    _launch(out, values, residual, weight, eps, True, pdl, raw, scale, one)
    return Fp8Rows(out, scale, one, residual.dtype)


def _launch(
    out: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, add: bool, pdl: bool,
    raw: Raw | None = None, out_scale: Tensor | None = None, one: Tensor | None = None,
) -> None:  # fmt: skip
    rows, size = x.shape
    if rows == 0:
        return
    # Raw products come from the vendor's library alone, which takes no part in dependent launch.
    pdl = pdl and rows <= FEW and raw is None
    block = triton.next_power_of_2(size)
    launch = {"launch_pdl": True} if pdl else {}
    _norm_kernel[(rows,)](
        out, x, residual, weight, eps, x.stride(0), residual.stride(0),
        None if raw is None else raw.token_scale, None if raw is None else raw.scale, out_scale, one,
        SIZE=size, BLOCK=block, ADD=add, RAW=raw is not None, QUANTIZE=out_scale is not None, PDL=pdl,
        num_warps=warps_for(block), **launch,
    )  # fmt: skip


rms_norm_hopper = partial(rms_norm, pdl=True)
add_rms_norm_hopper = partial(add_rms_norm, pdl=True)
add_rms_norm_fp8_hopper = partial(add_rms_norm_fp8, pdl=True)
