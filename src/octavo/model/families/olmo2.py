"""OLMo 2: norms after the branches only, q/k norms over the whole projection (OLMo team 2024)."""

from __future__ import annotations

from octavo.model.blocks import Attention, Layer
from octavo.model.decoder import Decoder


class Olmo2(Decoder):
    """Post-norm layers."""

    def layer(self, i: int) -> Layer:
        return self.post_norm_layer(i)

    def attention(self, i: int) -> Attention:
        return self.with_whole_norms(super().attention(i))


FAMILY = Olmo2
