"""Qwen 1.5 and 2 MoE: Qwen 2 with fine-grained experts and a gated shared one (Qwen team 2024)."""

from __future__ import annotations

from octavo.model.blocks import FeedForward, Linear, MoE, Part
from octavo.model.decoder import Decoder


class Qwen2Moe(Decoder):
    """Layers in ``mlp_only_layers``, and those between the steps of ``decoder_sparse_step``, are dense."""

    def qkv_bias(self) -> bool:
        return self.keys.flag("qkv_bias", True)

    def output_bias(self) -> bool:
        return False

    def mlp(self, i: int) -> FeedForward:
        if not self.is_sparse(i):
            return self.gated_mlp()
        keys = self.keys
        num = keys.integer("num_experts")
        router = self.router(
            num, keys.integer("num_experts_per_tok"), renormalize=keys.flag("norm_topk_prob", False)
        )
        gate = Part("mlp.shared_expert_gate", "ffn_gate_inp_shexp", 1)
        return MoE(
            router,
            self.experts(num, keys.integer("moe_intermediate_size")),
            self.arch.activation,
            shared=self.gated_mlp(
                "mlp.shared_expert", keys.integer("shared_expert_intermediate_size"), "_shexp"
            ),
            shared_gate=Linear(self.arch.hidden_size, (gate,)),
        )


FAMILY = Qwen2Moe
