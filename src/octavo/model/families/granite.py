"""Granite 3.x and 4 dense: Llama's shape with four multipliers (IBM 2024)."""

from __future__ import annotations

from dataclasses import replace

from octavo.model.blocks import Attention, DecoderSpec, Embedding, Layer
from octavo.model.decoder import Decoder


class Granite(Decoder):
    """Embeddings, both branches and scores are scaled, logits divided."""

    def spec(self) -> DecoderSpec:
        divisor = self.keys.positive("logits_scaling", 1.0)
        return replace(super().spec(), logit_scale=1.0 / divisor)

    def embedding(self) -> Embedding:
        return replace(super().embedding(), scale=self.keys.number("embedding_multiplier", 1.0))

    def layer(self, i: int) -> Layer:
        return replace(super().layer(i), residual_scale=self.keys.number("residual_multiplier", 1.0))

    def attention(self, i: int) -> Attention:
        return replace(super().attention(i), scale=self.keys.number("attention_multiplier", 1.0))


FAMILY = Granite
