"""The dense linear map; on GPUs one token takes a kernel of our own, more the vendor's library."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from octavo.device.ops.activation import act_mul
from octavo.device.ops.bind import Op, triton_rows


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] times weight [N, K] transposed, plus bias [N]: [T, N] in x's type."""
    return F.linear(x, weight, bias)


LINEAR = Op("linear", linear, triton_rows("linear:linear", "linear_hopper"))


def gated_linear(x: Tensor, weight: Tensor, activation: str) -> Tensor:
    """``act_mul(linear(x, weight), activation)`` for weight [2F, K], gate rows first: [T, F] in x's type.

    One token takes one kernel for both; a sum of products is rounded to x's type before the activation, as if stored.
    """
    return act_mul(F.linear(x, weight), activation)


GATED_LINEAR = Op("gated_linear", gated_linear, triton_rows("linear:gated_linear", "gated_linear_hopper"))
