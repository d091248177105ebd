"""The gated MLP: fused gate and up, activation times up, down."""

from __future__ import annotations

from torch import Tensor

from octavo.device.ops.activation import ACT_MUL
from octavo.model.blocks import GatedMLP
from octavo.model.layers.build import Build
from octavo.model.layers.linear import LinearLayer
from octavo.model.layers.load import LoadItem


class MLPLayer:
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
