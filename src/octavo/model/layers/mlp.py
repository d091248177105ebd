"""MLPs: gated (fused gate and up, activation times up, down) and plain (up, activation, down)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from octavo.device.ops.activation import ACT_MUL
from octavo.model.blocks import Activation, GatedMLP, PlainMLP
from octavo.model.layers.build import Build
from octavo.model.layers.linear import LinearLayer
from octavo.model.layers.load import LoadItem


class GatedMLPLayer:
    """Three calls."""

    def __init__(self, block: GatedMLP, build: Build, hf_prefix: str, gguf_prefix: str) -> None:
        self.activation = block.activation
        self.gate_up = LinearLayer(block.gate_up, build, hf_prefix, gguf_prefix)
        self.down = LinearLayer(block.down, build, hf_prefix, gguf_prefix)
        self.act_mul = build.binder.bind(ACT_MUL, build.spec)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.act_mul(self.gate_up(x), self.activation))

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
