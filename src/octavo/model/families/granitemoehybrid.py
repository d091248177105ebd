"""Granite 4 hybrids: Mamba-2 layers, attention without rotation, Granite's multipliers (IBM 2025)."""

from __future__ import annotations

from dataclasses import replace

from octavo.model.blocks import (
    Attention,
    DecoderSpec,
    Embedding,
    FeedForward,
    GatedMLP,
    Layer,
    Mixer,
    MoE,
    Part,
)
from octavo.model.decoder import Decoder
from octavo.model.hybrid import LINEAR, mamba2


class GraniteMoeHybrid(Decoder):
    """Gate and up of the MLP are stored as one matrix, beside stacked experts where there are any."""

    def spec(self) -> DecoderSpec:
        divisor = self.keys.positive("logits_scaling", 1.0)
        return replace(super().spec(), logit_scale=1.0 / divisor)

    def embedding(self) -> Embedding:
        return replace(super().embedding(), scale=self.keys.number("embedding_multiplier", 1.0))

    def layer(self, i: int) -> Layer:
        return replace(super().layer(i), residual_scale=self.keys.number("residual_multiplier", 1.0))

    def mixer(self, i: int) -> Mixer:
        return mamba2(self) if self.arch.layer_types[i] == LINEAR else self.attention(i)

    def attention(self, i: int) -> Attention:
        found = super().attention(i)
        rotates = self.keys.source.get("position_embedding_type") == "rope"
        scale = self.keys.number("attention_multiplier", 1.0)
        return replace(found, scale=scale, rope=found.rope if rotates else None)

    def mlp(self, i: int) -> FeedForward:
        num = self.keys.integer("num_local_experts", 8, least=0)
        if not num:
            return self.shared_mlp()
        routed = self.router(
            num, self.keys.integer("num_experts_per_tok", 2), hf="block_sparse_moe.router.layer"
        )
        experts = replace(
            self.experts(num, self.arch.intermediate_size, "block_sparse_moe"),
            hf_stacked=("input_linear.weight", "output_linear.weight"),
        )
        router = replace(routed, scoring="softmax_top_k")
        return MoE(router, experts, self.arch.activation, shared=self.shared_mlp())

    def shared_mlp(self) -> GatedMLP:
        """What every token visits."""
        a, inner = self.arch, self.keys.integer("shared_intermediate_size", 1024)
        parts = self.slices(Part("shared_mlp.input_linear", "ffn_up", 0), [inner, inner])
        down = [Part("shared_mlp.output_linear", "ffn_down", a.hidden_size)]
        return GatedMLP(
            gate_up=self.linear(parts, a.hidden_size),
            down=self.linear(down, inner, row=True),
            intermediate=inner,
            activation=a.activation,
        )


FAMILY = GraniteMoeHybrid
