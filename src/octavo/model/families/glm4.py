"""GLM-4 0414 dense: norms before and after both branches, half of each head rotated in pairs (Zhipu AI 2025)."""

from __future__ import annotations

from dataclasses import replace

from octavo.model.blocks import FeedForward, GatedMLP, Layer, Part
from octavo.model.decoder import Decoder


class Glm4(Decoder):
    """Gate and up are one stored tensor; checkpoints interleave rotary pairs."""

    hf_permuted_rope = True

    def layer(self, i: int) -> Layer:
        return replace(
            super().layer(i),
            post_attention_norm=self.norm("post_self_attn_layernorm", "post_attention_norm"),
            post_mlp_norm=self.norm("post_mlp_layernorm", "post_ffw_norm"),
        )

    def output_bias(self) -> bool:
        return False

    def mlp(self, i: int) -> FeedForward:
        a = self.arch
        inner = a.intermediate_size
        gate_up = self.slices(Part("mlp.gate_up_proj", "ffn_up", 0), [inner, inner])
        return GatedMLP(
            gate_up=self.linear(gate_up, a.hidden_size),
            down=self.linear([Part("mlp.down_proj", "ffn_down", a.hidden_size)], inner, row=True),
            intermediate=inner,
            activation=a.activation,
        )


FAMILY = Glm4
