"""ERNIE 4.5 dense: Llama's shape, rotary pairs interleaved, one switch for all biases (Baidu 2025)."""

from __future__ import annotations

from octavo.model.arch import ArchConfig
from octavo.model.decoder import Decoder


class Ernie45(Decoder):
    """``use_bias`` covers attention and MLP."""

    hf_permuted_rope = True

    def __init__(self, arch: ArchConfig) -> None:
        super().__init__(arch)
        self.biased = self.keys.flag("use_bias", False)

    def qkv_bias(self) -> bool:
        return self.biased

    def output_bias(self) -> bool:
        return self.biased

    def mlp_bias(self) -> bool:
        return self.biased


FAMILY = Ernie45
