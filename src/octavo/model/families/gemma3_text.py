"""Gemma 3 text: Gemma 2's norms plus q/k norms, five windows to one full layer, two rope bases (Gemma team 2025)."""

from __future__ import annotations

from dataclasses import replace

from octavo.model.blocks import Embedding, Layer
from octavo.model.decoder import Decoder


class Gemma3(Decoder):
    """Four norms a layer, q/k norms; the rope base follows the layer type."""

    norm_offset = 1.0
    qk_norm = True

    def embedding(self) -> Embedding:
        return replace(super().embedding(), scale=self.arch.hidden_size**0.5)

    def layer(self, i: int) -> Layer:
        return self.sandwich_layer(i)


FAMILY = Gemma3
