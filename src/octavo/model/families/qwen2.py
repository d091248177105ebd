"""Qwen 2 and 2.5: biases on q, k and v, always (Qwen team 2024)."""

from __future__ import annotations

from octavo.model.decoder import Decoder


class Qwen2(Decoder):
    """Llama's shape with qkv biases."""

    def qkv_bias(self) -> bool:
        return True

    def output_bias(self) -> bool:
        return False


FAMILY = Qwen2
