"""Bamba: Mamba-2 layers with a rotary attention now and then, dense MLP (IBM, Princeton, CMU, UIUC 2024)."""

from __future__ import annotations

from dataclasses import replace

from octavo.model.blocks import DecoderSpec, FeedForward, Layer, Mixer
from octavo.model.decoder import Decoder
from octavo.model.hybrid import LINEAR, mamba2


class Bamba(Decoder):
    """The MLP and its norm have names of their own."""

    def spec(self) -> DecoderSpec:
        return replace(super().spec(), norm=self.norm("model.final_layernorm", "output_norm"))

    def mixer(self, i: int) -> Mixer:
        return mamba2(self) if self.arch.layer_types[i] == LINEAR else self.attention(i)

    def layer(self, i: int) -> Layer:
        return replace(super().layer(i), pre_mlp_norm=self.norm("pre_ff_layernorm", "ffn_norm"))

    def mlp(self, i: int) -> FeedForward:
        return self.gated_mlp("feed_forward")


FAMILY = Bamba
