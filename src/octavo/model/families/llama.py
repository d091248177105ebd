"""Llama 2, 3.x and what shares its shape (SmolLM2, Yi, ...): plain pre-norm decoder (Touvron et al. 2023)."""

from __future__ import annotations

from octavo.model.decoder import Decoder


class Llama(Decoder):
    """The default shape; GGUF stores its rotary pairs interleaved."""

    gguf_permuted_rope = True


FAMILY = Llama
