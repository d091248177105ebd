"""Qwen3-Next: three gated delta rule layers to one gated attention, fine-grained experts (Qwen team 2025)."""

from __future__ import annotations

from dataclasses import replace

from octavo.model.blocks import DecoderSpec
from octavo.model.hybrid import GatedDeltaDecoder


class Qwen3Next(GatedDeltaDecoder):
    """Layers of multi-token prediction, which checkpoints bring, are of no use here."""

    def spec(self) -> DecoderSpec:
        return replace(super().spec(), ignored_prefixes=("mtp.",))


FAMILY = Qwen3Next
