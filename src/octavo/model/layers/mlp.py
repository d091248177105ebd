"""MLPs: gated (fused gate and up, activation times up, down) and plain (up, activation, down)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from octavo.device.ops.activation import ACT_MUL
from octavo.device.ops.fp8 import ACT_MUL_FP8
from octavo.device.ops.linear import GATED_LINEAR
from octavo.model.blocks import Activation, GatedMLP, PlainMLP
from octavo.model.layers.build import Build
from octavo.model.layers.linear import LinearLayer
from octavo.model.layers.load import LoadItem
from octavo.model.quantization.dense import DenseWeight


class GatedMLPLayer:
    """Three calls; two where gate and up are dense without a bias."""

    def __init__(self, block: GatedMLP, build: Build, hf_prefix: str, gguf_prefix: str) -> None:
        self.activation = block.activation
        self.gate_up = LinearLayer(block.gate_up, build, hf_prefix, gguf_prefix)
        self.down = LinearLayer(block.down, build, hf_prefix, gguf_prefix)
        self.act_mul = build.binder.bind(ACT_MUL, build.spec)
        self.act_mul_fp8 = build.binder.bind(ACT_MUL_FP8, build.spec) if self.down.fp8 else None
        weight = self.gate_up.weight if self.gate_up.bias is None else None
        self.dense = weight if isinstance(weight, DenseWeight) else None
        self.limit = block.limit
        fused = self.dense is not None and not block.limit
        self.gated = build.binder.bind(GATED_LINEAR, build.spec) if fused else None
        self.leaves_scales = False  # to the norm that follows: the layer around it decides

    @property
    def input(self) -> LinearLayer:
        """The projection that reads what comes in."""
        return self.gate_up

    def __call__(self, x: Any) -> Any:
        """[T, E] from [T, E]; fp8 may come in quantized and go out without its scales."""
        down = self.down.branch if self.leaves_scales else self.down
        if self.gated is not None and self.dense is not None:
            return down(self.gated(x, self.dense.matrix, self.activation))
        if self.limit:
            return down(self.act_mul(self.gate_up(x), self.activation, self.limit))
        if self.act_mul_fp8 is None or self.down.fp8 is None:
            return down(self.act_mul(self.gate_up(x), self.activation))
        wide = self.gate_up.branch(x)
        return down(self.act_mul_fp8(wide, self.activation, self.down.fp8.takes_rows(x.shape[0])))

    def items(self) -> list[LoadItem]:
        """What the loader must fill."""
        return self.gate_up.items() + self.down.items()


class PlainMLPLayer:
    """Three calls."""

    def __init__(self, block: PlainMLP, build: Build, hf_prefix: str, gguf_prefix: str) -> None:
        self.activation = block.activation
        self.up = LinearLayer(block.up, build, hf_prefix, gguf_prefix)
        self.down = LinearLayer(block.down, build, hf_prefix, gguf_prefix)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(activate(self.up(x), self.activation))

    def items(self) -> list[LoadItem]:
        """What the loader must fill."""
        return self.up.items() + self.down.items()


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The activation alone; the vendor's kernels do it in one pass."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu2":
        return F.relu(x).square()
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
