"""EXAONE 4.0: norms after both branches and on each head; with windows, full layers do not rotate (LG AI 2025)."""

from __future__ import annotations

from octavo.model.blocks import Layer, Rope
from octavo.model.decoder import Decoder


class Exaone4(Decoder):
    """The small models have neither windows nor layers without rope."""

    qk_norm = True

    def layer(self, i: int) -> Layer:
        return self.post_norm_layer(i)

    def rope(self, i: int) -> Rope | None:
        hybrid = self.keys.source.get("sliding_window") is not None
        return None if hybrid and self.arch.layer_types[i] == "full_attention" else super().rope(i)


FAMILY = Exaone4
