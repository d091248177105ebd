"""Gemma 1: Llama's shape with (1 + w) norms, GELU and scaled embeddings (Gemma team 2024)."""

from __future__ import annotations

from dataclasses import replace

from octavo.model.blocks import Embedding
from octavo.model.decoder import Decoder


class Gemma(Decoder):
    """The embedding is multiplied by sqrt(hidden)."""

    norm_offset = 1.0

    def embedding(self) -> Embedding:
        return replace(super().embedding(), scale=self.arch.hidden_size**0.5)


FAMILY = Gemma
