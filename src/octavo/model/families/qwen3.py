"""Qwen 3 dense: per-head q/k norms instead of biases (Qwen team 2025)."""

from __future__ import annotations

from octavo.model.decoder import Decoder


class Qwen3(Decoder):
    """Llama's shape with q/k norms."""

    qk_norm = True


FAMILY = Qwen3
