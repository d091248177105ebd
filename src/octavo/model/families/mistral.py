"""Mistral 7B and successors: Llama's shape, optionally with a sliding window in every layer (Jiang et al. 2023)."""

from __future__ import annotations

from octavo.model.decoder import Decoder


class Mistral(Decoder):
    """The window is in ``layer_types``; GGUF files call themselves llama."""

    gguf_permuted_rope = True


FAMILY = Mistral
