"""RMSNorm in Triton, alone and fused with the residual addition: one program a row, one pass over memory."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm_kernel(
    out, x, residual, weight, eps, stride_x, stride_residual, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[row] = x[row] / rms(x[row]) * weight; with ADD, residual[row] += x[row] first and that is normed."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    wide = tl.load(x + row * stride_x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        place = residual + row * stride_residual + at
        wide += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        total = wide.to(residual.dtype.element_ty)  # the norm sees what is stored
        tl.store(place, total, mask=inside)
        wide = total.to(tl.float32)
    rms = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
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


def _launch(
    out: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, add: bool, pdl: bool
) -> None:
    rows, size = x.shape
    if rows == 0:
        return
    pdl = pdl and rows == 1  # with more the neighbours are library kernels, which take no part in it
    block = triton.next_power_of_2(size)
    launch = {"launch_pdl": True} if pdl else {}
    _norm_kernel[(rows,)](
        out, x, residual, weight, eps, x.stride(0), residual.stride(0),
        SIZE=size, BLOCK=block, ADD=add, PDL=pdl, num_warps=warps_for(block), **launch,
    )  # fmt: skip


rms_norm_hopper = partial(rms_norm, pdl=True)
add_rms_norm_hopper = partial(add_rms_norm, pdl=True)
