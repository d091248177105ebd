"""Command R: parallel branches over one LayerNorm, rotary pairs interleaved (Cohere 2024)."""

from __future__ import annotations

from dataclasses import replace

from octavo.errors import UnsupportedModelError
from octavo.model.arch import ArchConfig
from octavo.model.blocks import DecoderSpec, Layer
from octavo.model.decoder import Decoder


class Cohere(Decoder):
    """LayerNorm without bias. Command R+ norms each head with weights of its own, which has no block yet."""

    norm_kind = "layer"
    hf_permuted_rope = True

    def __init__(self, arch: ArchConfig) -> None:
        super().__init__(arch)
        if self.keys.flag("use_qk_norm", False):
            raise UnsupportedModelError("config.json: use_qk_norm of Command R+ is not supported.")

    def spec(self) -> DecoderSpec:
        return replace(super().spec(), logit_scale=self.keys.number("logit_scale", 0.0625))

    def layer(self, i: int) -> Layer:
        return replace(super().layer(i), pre_mlp_norm=None, parallel=True)


FAMILY = Cohere
