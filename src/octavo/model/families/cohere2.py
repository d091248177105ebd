"""Command R7B and successors: parallel branches over one LayerNorm, rope in windowed layers only (Cohere 2024)."""

from __future__ import annotations

from dataclasses import replace

from octavo.model.blocks import DecoderSpec, Layer, Rope
from octavo.model.decoder import Decoder


class Cohere2(Decoder):
    """LayerNorm without bias; checkpoints interleave rotary pairs."""

    norm_kind = "layer"
    hf_permuted_rope = True

    def spec(self) -> DecoderSpec:
        return replace(super().spec(), logit_scale=self.keys.number("logit_scale", 0.0625))

    def layer(self, i: int) -> Layer:
        return replace(super().layer(i), pre_mlp_norm=None, parallel=True)

    def rope(self, i: int) -> Rope | None:
        return super().rope(i) if self.arch.layer_types[i] == "sliding_attention" else None


FAMILY = Cohere2
