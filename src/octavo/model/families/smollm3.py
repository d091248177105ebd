"""SmolLM3: Llama's shape, every fourth layer without position encoding (Hugging Face 2025; Yang et al. 2025)."""

from __future__ import annotations

from octavo.errors import ModelFileError, UnsupportedModelError
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
        every = self.keys.integer("no_rope_layer_interval", 4)
        default = [int((i + 1) % every != 0) for i in range(arch.num_layers)]
        self.with_rope = self.keys.source.get("no_rope_layers") or default
        if not isinstance(self.with_rope, list) or len(self.with_rope) != arch.num_layers:
            raise ModelFileError(
                f"config.json: no_rope_layers must list 0 or 1 for each of {arch.num_layers} layers."
            )

    def rope(self, i: int) -> Rope | None:
        return super().rope(i) if self.with_rope[i] else None


FAMILY = SmolLM3
