"""GLM-4.5 and 4.6: sigmoid routing with a corrected choice and a shared expert, partial rotation (Zhipu AI 2025)."""

from __future__ import annotations

from dataclasses import replace

from octavo.model.arch import ArchConfig
from octavo.model.blocks import DecoderSpec, FeedForward
from octavo.model.decoder import Decoder


class Glm4Moe(Decoder):
    """The first layers are dense; the layers behind the last are for drafting and not loaded."""

    def __init__(self, arch: ArchConfig) -> None:
        super().__init__(arch)
        self.qk_norm = self.keys.flag("use_qk_norm", False)

    def spec(self) -> DecoderSpec:
        return replace(super().spec(), ignored_prefixes=self.drafting_layers(1))

    def output_bias(self) -> bool:
        return False

    def mlp(self, i: int) -> FeedForward:
        keys = self.keys
        if i < keys.integer("first_k_dense_replace", 1, least=0):
            return self.gated_mlp()
        return self.shared_experts(self.corrected_router(), keys.integer("moe_intermediate_size", 1408))


FAMILY = Glm4Moe
