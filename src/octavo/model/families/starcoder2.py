"""StarCoder2: LayerNorm and biases everywhere, plain MLP, sliding window (Lozhkov et al. 2024)."""

from __future__ import annotations

from octavo.model.blocks import FeedForward
from octavo.model.decoder import Decoder


class Starcoder2(Decoder):
    """``use_bias`` covers all projections."""

    norm_kind = "layer"
    norm_bias = True

    def qkv_bias(self) -> bool:
        return self.keys.flag("use_bias", True)

    def output_bias(self) -> bool:
        return self.keys.flag("use_bias", True)

    def mlp(self, i: int) -> FeedForward:
        return self.plain_mlp("mlp.c_fc", "mlp.c_proj", bias=self.keys.flag("use_bias", True))


FAMILY = Starcoder2
