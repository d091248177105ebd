"""Seed-OSS: Llama's shape with biases on q, k and v (ByteDance 2025)."""

from __future__ import annotations

from octavo.model.decoder import Decoder


class SeedOss(Decoder):
    """The output projection's bias has a switch of its own."""

    def output_bias(self) -> bool:
        return self.keys.flag("attention_out_bias", False)


FAMILY = SeedOss
