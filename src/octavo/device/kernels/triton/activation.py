"""act(gate) * up in Triton: one read of the fused input, one write."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _act_mul_kernel(
    out, gate_up, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr
):
    """BLOCK values of one row; ACTIVATION 0 = silu, 1 = gelu_tanh, 2 = gelu."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    gate = tl.load(gate_up + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + SIZE + at, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == 0:
        small = tl.exp(-tl.abs(gate))
        gate = gate * tl.where(gate > 0, 1.0, small) / (1.0 + small)
    elif ACTIVATION == 1:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        small = tl.exp(-2.0 * tl.abs(inner))
        gate = (
            gate * tl.where(inner > 0, 1.0, small) / (1.0 + small)
        )  # (1 + tanh(inner)) / 2, never overflows
    else:
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(out + row * SIZE + at, (gate * up).to(out.dtype.element_ty), mask=inside)


def act_mul(gate_up: Tensor, activation: str, *, pdl: bool = False) -> Tensor:
    """``octavo.device.ops.activation.act_mul`` on a GPU; rows of gate_up are contiguous."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if rows == 0:
        return out
    pdl = pdl and rows == 1  # with more the neighbours are library kernels, which take no part in it
    launch = {"launch_pdl": True} if pdl else {}
    _act_mul_kernel[(rows, triton.cdiv(size, BLOCK))](
        out, gate_up, gate_up.stride(0), SIZE=size, BLOCK=BLOCK,
        ACTIVATION={"silu": 0, "gelu_tanh": 1}.get(activation, 2), PDL=pdl, num_warps=4, **launch,
    )  # fmt: skip
    return out


act_mul_hopper = partial(act_mul, pdl=True)
