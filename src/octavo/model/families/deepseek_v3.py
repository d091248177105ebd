"""DeepSeek V3, R1 and Kimi-K2: latent attention, experts chosen in groups by corrected sigmoids (DeepSeek-AI 2024)."""

from __future__ import annotations

from octavo.model.latent import LatentDecoder


class DeepseekV3(LatentDecoder):
    """The layers behind the last predict further tokens; they are not loaded."""


FAMILY = DeepseekV3
