"""Qwen 3.5 text: Qwen3-Next's layers with projections stored apart and a dense MLP (Qwen team 2026)."""

from __future__ import annotations

from dataclasses import replace

from octavo.model.blocks import DecoderSpec
from octavo.model.hybrid import GatedDeltaDecoder


class Qwen35(GatedDeltaDecoder):
    """Layers of multi-token prediction, which checkpoints bring, are of no use here."""

    joint = False

    def spec(self) -> DecoderSpec:
        return replace(super().spec(), ignored_prefixes=("mtp.",))


FAMILY = Qwen35
