"""The dense linear map; on GPUs one token takes a kernel of our own, more the vendor's library."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from octavo.device.ops.bind import Op, triton_rows


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] times weight [N, K] transposed, plus bias [N]: [T, N] in x's type."""
    return F.linear(x, weight, bias)


LINEAR = Op("linear", linear, triton_rows("linear:linear", "linear_hopper"))
