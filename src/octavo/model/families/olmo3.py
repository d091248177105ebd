"""OLMo 3: OLMo 2's layers, three windows to one full layer, whose rope alone is scaled (OLMo team 2025)."""

from __future__ import annotations

from octavo.model.blocks import Attention, Layer
from octavo.model.decoder import Decoder


class Olmo3(Decoder):
    """Post-norm layers; windows and ropes are in the configuration."""

    def layer(self, i: int) -> Layer:
        return self.post_norm_layer(i)

    def attention(self, i: int) -> Attention:
        return self.with_whole_norms(super().attention(i))


FAMILY = Olmo3
