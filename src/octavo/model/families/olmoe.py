"""OLMoE: fine-grained experts, q/k norms over the whole projection (Muennighoff et al. 2024)."""

from __future__ import annotations

from octavo.errors import UnsupportedModelError
from octavo.model.arch import ArchConfig
from octavo.model.blocks import Attention, FeedForward, MoE
from octavo.model.decoder import Decoder


class Olmoe(Decoder):
    """Every MLP is a mixture."""

    def __init__(self, arch: ArchConfig) -> None:
        super().__init__(arch)
        if self.keys.number("clip_qkv", 0.0):
            raise UnsupportedModelError("config.json: clip_qkv is not supported.")

    def attention(self, i: int) -> Attention:
        return self.with_whole_norms(super().attention(i))

    def mlp(self, i: int) -> FeedForward:
        keys = self.keys
        num = keys.integer("num_experts", 64)
        router = self.router(
            num, keys.integer("num_experts_per_tok", 8), renormalize=keys.flag("norm_topk_prob", False)
        )
        return MoE(router, self.experts(num, self.arch.intermediate_size), self.arch.activation)


FAMILY = Olmoe
