"""AFM 4.5B: Llama's shape with a plain MLP of squared ReLUs (Arcee AI 2025; So et al. 2021)."""

from __future__ import annotations

from octavo.model.blocks import FeedForward
from octavo.model.decoder import Decoder


class Arcee(Decoder):
    """No gate."""

    def mlp(self, i: int) -> FeedForward:
        return self.plain_mlp("mlp.up_proj", "mlp.down_proj", bias=self.mlp_bias())


FAMILY = Arcee
