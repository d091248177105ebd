"""GLM-4.5 and 4.6: sigmoid routing with a corrected choice and a shared expert, partial rotation (Zhipu AI 2025)."""

from __future__ import annotations

from dataclasses import replace

from octavo.errors import ModelFileError
from octavo.model.arch import ArchConfig
from octavo.model.blocks import DecoderSpec, FeedForward, MoE, Router
from octavo.model.decoder import Decoder


class Glm4Moe(Decoder):
    """The first layers are dense; the layers behind the last are for drafting and not loaded."""

    def __init__(self, arch: ArchConfig) -> None:
        super().__init__(arch)
        self.qk_norm = self.keys.flag("use_qk_norm", False)

    def spec(self) -> DecoderSpec:
        count = self.arch.num_layers
        drafting = self.keys.integer("num_nextn_predict_layers", 1, least=0)
        prefixes = tuple(f"model.layers.{count + i}." for i in range(drafting))
        return replace(super().spec(), ignored_prefixes=prefixes)

    def output_bias(self) -> bool:
        return False

    def mlp(self, i: int) -> FeedForward:
        keys = self.keys
        if i < keys.integer("first_k_dense_replace", 1, least=0):
            return self.gated_mlp()
        inner = keys.integer("moe_intermediate_size", 1408)
        shared = keys.integer("n_shared_experts", 1)
        return MoE(
            self.corrected_router(),
            self.experts(keys.integer("num_experts"), inner),
            self.arch.activation,
            shared=self.gated_mlp("mlp.shared_experts", shared * inner, "_shexp"),
        )

    def corrected_router(self) -> Router:
        """Sigmoid scores; groups and the correction guide the choice."""
        keys = self.keys
        num, groups = keys.integer("num_experts"), keys.integer("n_group", 1)
        top_groups, top_k = keys.integer("topk_group", 1), keys.integer("num_experts_per_tok")
        if num % groups or top_groups > groups or top_k > top_groups * (num // groups):
            raise ModelFileError(
                f"config.json: {top_k} of {num} experts in {top_groups} of {groups} groups cannot be chosen."
            )
        return replace(
            self.router(num, top_k, renormalize=keys.flag("norm_topk_prob", True)),
            scoring="sigmoid",
            scale=keys.number("routed_scaling_factor", 1.0),
            groups=groups,
            top_groups=top_groups,
            correction="mlp.gate.e_score_correction_bias",
            gguf_correction="exp_probs_b.bias",
        )


FAMILY = Glm4Moe
