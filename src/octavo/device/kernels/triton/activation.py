"""act(gate) * up in Triton: one read of the fused input, one write."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.device.kernels.rows import FEW, Fp8Rows, Raw
from octavo.device.kernels.triton.quantize import empty_rows, quantized_row

BLOCK = 1024
KINDS = {"silu": 0, "gelu_tanh": 1}


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    """ACTIVATION 0 = silu, 1 = gelu_tanh, 2 = gelu; never overflows."""
    if ACTIVATION == 0:
        small = tl.exp(-tl.abs(gate))
        gate = gate * tl.where(gate > 0, 1.0, small) / (1.0 + small)
    elif ACTIVATION == 1:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        small = tl.exp(-2.0 * tl.abs(inner))
        gate = gate * tl.where(inner > 0, 1.0, small) / (1.0 + small)  # (1 + tanh(inner)) / 2
    else:
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    return gate


@triton.jit
def _act_mul_kernel(
    out, gate_up, stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK values of one row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    gate = tl.load(gate_up + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + SIZE + at, mask=inside, other=0.0).to(tl.float32)
    if LIMIT > 0:
        gate, up = tl.minimum(gate, LIMIT), tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    tl.store(out + row * SIZE + at, (activate(gate, ACTIVATION) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _act_mul_fp8_kernel(
    out, gate_up, stride, token_scale, scale, out_scale, one, kind,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, RAW: tl.constexpr, QUANTIZE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program a row, or BLOCK values of it without QUANTIZE; RAW and QUANTIZE as in the norm. ``kind`` is of the run
    type, to which values are rounded as if they were stored."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    gate = tl.load(gate_up + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + SIZE + at, mask=inside, other=0.0).to(tl.float32)
    if RAW:
        unit = tl.load(token_scale + row)
        gate = gate * unit * tl.load(scale + at, mask=inside, other=0.0)
        up = up * unit * tl.load(scale + SIZE + at, mask=inside, other=0.0)
        gate = gate.to(kind.dtype.element_ty).to(tl.float32)
        up = up.to(kind.dtype.element_ty).to(tl.float32)
    result = activate(gate, ACTIVATION) * up
    if QUANTIZE:
        values, unit = quantized_row(result.to(kind.dtype.element_ty).to(tl.float32))
        tl.store(out + row * SIZE + at, values.to(out.dtype.element_ty), mask=inside)
        tl.store(out_scale + row, unit)
        if row == 0:
            tl.store(one, 1.0)
    else:
        tl.store(out + row * SIZE + at, result.to(out.dtype.element_ty), mask=inside)


def act_mul(gate_up: Tensor, activation: str, limit: float = 0.0, *, pdl: bool = False) -> Tensor:
    """``octavo.device.ops.activation.act_mul`` on a GPU; rows of gate_up are contiguous."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if rows == 0:
        return out
    pdl = pdl and rows <= FEW
    launch = {"launch_pdl": True} if pdl else {}
    _act_mul_kernel[(rows, triton.cdiv(size, BLOCK))](
        out, gate_up, gate_up.stride(0), SIZE=size, BLOCK=BLOCK,
        ACTIVATION=KINDS.get(activation, 2), LIMIT=limit, PDL=pdl, num_warps=4, **launch,
    )  # fmt: skip
    return out


act_mul_hopper = partial(act_mul, pdl=True)


def act_mul_fp8(
    gate_up: Tensor | Raw, activation: str, quantize: bool, *, pdl: bool = False
) -> Tensor | Fp8Rows:
    """``octavo.device.ops.fp8.act_mul_fp8`` on a GPU; rows of gate_up are contiguous."""
    raw = None if isinstance(gate_up, Tensor) else gate_up
    if raw is None and not quantize:
        return act_mul(gate_up, activation, pdl=pdl)
    values = gate_up if raw is None else raw.values
    rows, size = values.shape[0], values.shape[1] // 2
    kind = torch.empty(0, dtype=gate_up.dtype, device=values.device)
    if quantize:
        out, scale, one = empty_rows(rows, size, values.device)
        block = triton.next_power_of_2(size)
    else:
        out, scale, one, block = kind.new_empty(rows, size), None, None, BLOCK
    if rows:
        pdl = pdl and rows <= FEW
        _act_mul_fp8_kernel[(rows, triton.cdiv(size, block))](
            out, values, values.stride(0), None if raw is None else raw.token_scale,
            None if raw is None else raw.scale, scale, one, kind, SIZE=size, BLOCK=block,
            ACTIVATION=KINDS.get(activation, 2), RAW=raw is not None, QUANTIZE=quantize,
            PDL=pdl, num_warps=max(4, min(16, block // 512)), **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
    return Fp8Rows(out, scale, one, gate_up.dtype) if quantize else out


act_mul_fp8_hopper = partial(act_mul_fp8, pdl=True)
