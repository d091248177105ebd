"""Qwen 3 MoE: Qwen 3 with fine-grained experts, none shared (Qwen team 2025)."""

from __future__ import annotations

from octavo.model.blocks import FeedForward, MoE
from octavo.model.decoder import Decoder


class Qwen3Moe(Decoder):
    """Layers in ``mlp_only_layers``, and those between the steps of ``decoder_sparse_step``, are dense."""

    qk_norm = True

    def mlp(self, i: int) -> FeedForward:
        if not self.is_sparse(i):
            return self.gated_mlp()
        keys = self.keys
        num = keys.integer("num_experts")
        router = self.router(
            num, keys.integer("num_experts_per_tok"), renormalize=keys.flag("norm_topk_prob", False)
        )
        experts = self.experts(num, keys.integer("moe_intermediate_size"))
        return MoE(router, experts, self.arch.activation)


FAMILY = Qwen3Moe
