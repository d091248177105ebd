"""LayerNorm (Ba et al. 2016): the vendor's kernel is one pass already."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from octavo.device.ops.bind import Op


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis of x [..., E]; all in x's type."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


LAYER_NORM = Op("layer_norm", layer_norm)
