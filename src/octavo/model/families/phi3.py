"""Phi-3, Phi-3.5 and Phi-4: fused projections, longrope, partial rotation in the mini of Phi-4 (Microsoft 2024)."""

from __future__ import annotations

from octavo.model.blocks import FeedForward, GatedMLP, Linear, Part
from octavo.model.decoder import Decoder


class Phi3(Decoder):
    """Llama's shape; q, k and v are one stored tensor, gate and up another."""

    def qkv(self) -> Linear:
        a = self.arch
        q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        parts = self.slices(Part("self_attn.qkv_proj", "attn_qkv", 0), [q, kv, kv])
        return self.linear(parts, a.hidden_size)

    def output_bias(self) -> bool:
        return False

    def mlp(self, i: int) -> FeedForward:
        a = self.arch
        inner = a.intermediate_size
        return GatedMLP(
            gate_up=self.linear(
                self.slices(Part("mlp.gate_up_proj", "ffn_up", 0), [inner, inner]), a.hidden_size
            ),
            down=self.linear([Part("mlp.down_proj", "ffn_down", a.hidden_size)], inner, row=True),
            intermediate=inner,
            activation=a.activation,
        )


FAMILY = Phi3
