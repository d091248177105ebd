"""Llama 4's text model: rotated layers attend within chunks, every fourth sees all and does not rotate (Meta 2025)."""

from __future__ import annotations

from dataclasses import replace

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.model.arch import ArchConfig
from octavo.model.blocks import Attention, FeedForward, MoE, Rope
from octavo.model.decoder import Decoder


class Llama4Text(Decoder):
    """One expert a token, which sees its input times the router's sigmoid, beside a shared one."""

    hf_permuted_rope = True

    def __init__(self, arch: ArchConfig) -> None:
        super().__init__(arch)
        keys = self.keys
        self.rotated = keys.rope_layers(arch.num_layers)
        every = keys.integer("interleave_moe_layer_step", 1)
        sparse = keys.source.get("moe_layers")
        if sparse is None:
            sparse = list(range(every - 1, arch.num_layers, every))
        if not isinstance(sparse, list):
            raise ModelFileError(f"config.json: moe_layers must be a list, got {sparse!r}.")
        self.sparse: list[int] = sparse
        if keys.integer("num_experts_per_tok", 1) != 1:
            raise UnsupportedModelError(
                "config.json: Llama 4 with more than one expert a token is not supported."
            )

    def attention(self, i: int) -> Attention:
        keys, attention = self.keys, super().attention(i)
        if self.arch.layer_types[i] == "chunked_attention":
            attention = replace(attention, chunk=keys.integer("attention_chunk_size", 8192))
        if self.rotated[i]:
            eps = self.arch.norm_eps if keys.flag("use_qk_norm", True) else 0.0
            return replace(attention, unit_norm=eps)
        if not keys.flag("attn_temperature_tuning", True):
            return attention
        tuning = (keys.positive("floor_scale", 8192.0), keys.number("attn_scale", 0.1))
        return replace(attention, temperature=tuning)

    def rope(self, i: int) -> Rope | None:
        return super().rope(i) if self.rotated[i] else None

    def mlp(self, i: int) -> FeedForward:
        a, keys = self.arch, self.keys
        if i not in self.sparse:
            return self.gated_mlp("feed_forward", keys.integer("intermediate_size_mlp", 16384))
        num = keys.integer("num_experts")
        router = self.router(num, 1, hf="feed_forward.router", renormalize=False)
        return MoE(
            replace(router, scoring="sigmoid"),
            replace(self.experts(num, a.intermediate_size, "feed_forward.experts"), columns=True),
            a.activation,
            shared=self.gated_mlp("feed_forward.shared_expert", a.intermediate_size, "_shexp"),
            weigh_input=True,
        )


FAMILY = Llama4Text
