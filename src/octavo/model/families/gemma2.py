"""Gemma 2: (1 + w) norms around both branches, scaled embeddings, softcaps, alternating windows (Gemma team 2024)."""

from __future__ import annotations

from dataclasses import replace

from octavo.model.blocks import Embedding, Layer
from octavo.model.decoder import Decoder


class Gemma2(Decoder):
    """Four norms a layer; the embedding is multiplied by sqrt(hidden)."""

    norm_offset = 1.0

    def embedding(self) -> Embedding:
        return replace(super().embedding(), scale=self.arch.hidden_size**0.5)

    def layer(self, i: int) -> Layer:
        return self.sandwich_layer(i)


FAMILY = Gemma2
