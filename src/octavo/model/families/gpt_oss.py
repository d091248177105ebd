"""gpt-oss 20B and 120B: attention sinks, alternating windows, experts with biases and a clamped gate (OpenAI 2025)."""

from __future__ import annotations

from dataclasses import replace

from octavo.model.blocks import Attention, FeedForward, Layer, MoE, Part
from octavo.model.decoder import Decoder


class GptOss(Decoder):
    """Published checkpoints hold the experts as MXFP4; they are decoded while they load."""

    def layer(self, i: int) -> Layer:
        # GGUF files name the norm before the MLP after the attention that it follows.
        norm = self.norm("post_attention_layernorm", "post_attention_norm")
        return replace(super().layer(i), pre_mlp_norm=norm)

    def attention(self, i: int) -> Attention:
        sinks = Part("self_attn.sinks", "attn_sinks.weight", self.arch.num_heads)
        return replace(super().attention(i), sinks=sinks)

    def mlp(self, i: int) -> FeedForward:
        keys = self.keys
        num = keys.integer("num_experts")
        router = self.router(num, keys.integer("num_experts_per_tok"), hf="mlp.router", bias=True)
        experts = self.experts(num, keys.integer("moe_intermediate_size", self.arch.intermediate_size))
        return MoE(
            replace(router, scoring="softmax_top_k"),
            replace(experts, bias=True, interleaved=True),
            activation="swiglu_clamped",
            alpha=keys.number("swiglu_alpha", 1.702),
            limit=keys.positive("swiglu_limit", 7.0),
        )


FAMILY = GptOss
