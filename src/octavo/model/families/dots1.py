"""dots.llm1: norms on each head, DeepSeek-V3's router and shared experts (rednote-hilab 2025)."""

from __future__ import annotations

from octavo.model.blocks import FeedForward
from octavo.model.decoder import Decoder


class Dots1(Decoder):
    """The first layers are dense."""

    qk_norm = True

    def mlp(self, i: int) -> FeedForward:
        keys = self.keys
        if i < keys.integer("first_k_dense_replace", 0, least=0):
            return self.gated_mlp()
        return self.shared_experts(self.corrected_router(), keys.integer("moe_intermediate_size", 1408))


FAMILY = Dots1
