"""SmolLM3: Llama's shape, every fourth layer without position encoding (Hugging Face 2025; Yang et al. 2025)."""

from __future__ import annotations

from octavo.errors import UnsupportedModelError
from octavo.model.arch import ArchConfig
from octavo.model.blocks import Rope
from octavo.model.decoder import Decoder


class SmolLM3(Decoder):
    """``no_rope_layers`` has a 0 for each layer without rope."""

    gguf_permuted_rope = True

    def __init__(self, arch: ArchConfig) -> None:
        super().__init__(arch)
        if self.keys.flag("use_sliding_window", False) and self.keys.source.get("layer_types") is None:
            raise UnsupportedModelError(
                "config.json: SmolLM3 with sliding windows must list its layer_types."
            )
        self.with_rope = self.keys.rope_layers(arch.num_layers)

    def rope(self, i: int) -> Rope | None:
        return super().rope(i) if self.with_rope[i] else None


FAMILY = SmolLM3
