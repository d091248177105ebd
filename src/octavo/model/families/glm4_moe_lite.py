"""GLM-4.7-Flash: DeepSeek-V3's shape by other numbers (Zhipu AI 2026)."""

from __future__ import annotations

from octavo.model.latent import LatentDecoder


class Glm4MoeLite(LatentDecoder):
    """The first layer is dense; the layer behind the last is for drafting and not loaded."""


FAMILY = Glm4MoeLite
