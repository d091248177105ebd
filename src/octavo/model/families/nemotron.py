"""Nemotron-4 and Minitron: LayerNorm with 1 + w, partial rotation, squared ReLUs (Parmar et al. 2024)."""

from __future__ import annotations

from octavo.model.blocks import FeedForward
from octavo.model.decoder import Decoder


class Nemotron(Decoder):
    """No gate."""

    norm_kind = "layer"
    norm_bias = True
    norm_offset = 1.0

    def mlp(self, i: int) -> FeedForward:
        return self.plain_mlp("mlp.up_proj", "mlp.down_proj", bias=self.mlp_bias())


FAMILY = Nemotron
