"""What the families with multi-head latent attention share (DeepSeek-AI 2024). No torch."""

from __future__ import annotations

import math
from dataclasses import replace

from octavo.errors import ModelFileError
from octavo.model.blocks import DecoderSpec, FeedForward, LatentAttention, Linear, Norm, Part, Router
from octavo.model.decoder import Decoder
from octavo.model.rope import build_rope

LATENT_EPS = 1e-6  # of the norms inside the attention, whatever the configuration says of the others


class LatentDecoder(Decoder):
    """DeepSeek's shape: latent attention, then a dense MLP in the first layers and experts in the others."""

    def spec(self) -> DecoderSpec:
        return replace(super().spec(), ignored_prefixes=self.drafting_layers(0))

    def mixer(self, i: int) -> LatentAttention:
        """Latent attention of layer i."""
        a, keys = self.arch, self.keys
        nope, rope_dim = keys.integer("qk_nope_head_dim"), keys.integer("qk_rope_head_dim")
        latent, value = keys.integer("kv_lora_rank"), keys.integer("v_head_dim")
        rank = keys.integer("q_lora_rank", 0, least=0)
        turned = int(keys.flag("rope_interleave", True))
        name = ("self_attn.q_b_proj", "attn_q_b") if rank else ("self_attn.q_proj", "attn_q")
        query = Part(*name, a.num_heads * (nope + rope_dim), a.num_heads * turned, hf_heads=a.num_heads * turned,
                     rotated=rope_dim, turns_at=nope)  # fmt: skip
        compressed, key = self.slices(
            Part("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa", 0), [latent, rope_dim]
        )
        down = [compressed, replace(key, heads=turned, hf_heads=turned)]
        if rank:
            down.insert(0, Part("self_attn.q_a_proj", "attn_q_a", rank))
        up = Part("self_attn.kv_b_proj", "attn_kv_b", a.num_heads * (nope + value))
        output = Part("self_attn.o_proj", "attn_output", a.hidden_size)
        return LatentAttention(
            down=Linear(a.hidden_size, tuple(down), a.attention_bias),
            query_norm=self.latent_norm("self_attn.q_a_layernorm", "attn_q_a_norm", rank) if rank else None,
            query=self.linear([query], rank or a.hidden_size),
            latent_norm=self.latent_norm("self_attn.kv_a_layernorm", "attn_kv_a_norm", latent),
            up=self.linear([up], latent),
            output=self.linear([output], a.num_heads * value, bias=a.attention_bias, row=True),
            num_heads=a.num_heads,
            nope_dim=nope,
            rope_dim=rope_dim,
            value_dim=value,
            latent_dim=latent,
            scale=(nope + rope_dim) ** -0.5 * self.sharpening(i) ** 2,
            rope=build_rope(rope_dim, a.rope[a.layer_types[i]], a.max_position),
        )

    def latent_norm(self, hf: str, gguf: str, size: int) -> Norm:
        """A norm inside the attention."""
        return Norm(hf, gguf, size, LATENT_EPS)

    def sharpening(self, i: int) -> float:
        """What yarn multiplies queries and keys by in layer i, beside its rope's own scale."""
        a = self.arch
        parameters = dict(a.rope[a.layer_types[i]])
        weight, factor = parameters.get("mscale_all_dim") or 0.0, parameters.get("factor") or 1.0
        plain = (parameters.get("rope_type") or parameters.get("type") or "default") == "default"
        return 1.0 if plain or factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    def mlp(self, i: int) -> FeedForward:
        """Dense in the first layers, or where ``mlp_layer_types`` says so."""
        kinds = self.keys.source.get("mlp_layer_types")
        dense = i < self.keys.integer("first_k_dense_replace", 0, least=0)
        if kinds is not None:
            if not isinstance(kinds, list) or len(kinds) != self.arch.num_layers:
                raise ModelFileError("config.json: mlp_layer_types must list one type a layer.")
            dense = kinds[i] == "dense"
        if dense:
            return self.gated_mlp()
        return self.shared_experts(self.choice(), self.keys.integer("moe_intermediate_size"))

    def choice(self) -> Router:
        """How experts are chosen."""
        return self.corrected_router()
