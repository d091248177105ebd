"""Mixtral 8x7B and 8x22B: Mistral with experts, weighed by the softmax over the chosen two (Jiang et al. 2024)."""

from __future__ import annotations

from dataclasses import replace

from octavo.model.blocks import FeedForward, MoE
from octavo.model.decoder import Decoder


class Mixtral(Decoder):
    """Every MLP is a mixture; GGUF files call themselves llama."""

    gguf_permuted_rope = True

    def mlp(self, i: int) -> FeedForward:
        keys = self.keys
        num = keys.integer("num_experts")
        router = self.router(num, keys.integer("num_experts_per_tok"), hf="block_sparse_moe.gate")
        experts = self.experts(num, self.arch.intermediate_size, "block_sparse_moe.experts")
        return MoE(router, replace(experts, hf_each=("w1", "w3", "w2")), self.arch.activation)


FAMILY = Mixtral
