"""Gated activations: act(gate) * up over a fused [gate | up] input."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from octavo.device.ops.bind import Op, triton_rows


def act_mul(gate_up: Tensor, activation: str, limit: float = 0.0) -> Tensor:
    """act(gate_up[:, :F]) * gate_up[:, F:]; gate_up [T, 2F] -> [T, F]; activation silu | gelu_tanh | gelu.

    ``limit`` > 0 clamps the gate to at most so much, up to +-so much.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


ACT_MUL = Op("act_mul", act_mul, triton_rows("activation:act_mul", "act_mul_hopper"))
