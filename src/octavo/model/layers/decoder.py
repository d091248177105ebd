"""One decoder layer over a residual stream; the additions are fused into the norms that follow them."""

from __future__ import annotations

from torch import Tensor

from octavo.model.batch import Batch
from octavo.model.blocks import Layer
from octavo.model.layers.attention import AttentionLayer
from octavo.model.layers.build import Build
from octavo.model.layers.load import LoadItem
from octavo.model.layers.mlp import MLPLayer
from octavo.model.layers.norm import NormLayer


class DecoderLayer:
    """Takes the branch output of the layer before and the residual, returns its own branch output."""

    def __init__(self, block: Layer, build: Build, hf_prefix: str, gguf_prefix: str) -> None:
        def norm(which: str) -> NormLayer | None:
            found = getattr(block, which)
            return NormLayer(found, build, hf_prefix, gguf_prefix) if found is not None else None

        self.residual_scale = block.residual_scale
        self.input_norm = NormLayer(block.input_norm, build, hf_prefix, gguf_prefix)
        self.attention = AttentionLayer(block.attention, build, hf_prefix, gguf_prefix)
        self.post_attention_norm = norm("post_attention_norm")
        self.pre_mlp_norm = NormLayer(block.pre_mlp_norm, build, hf_prefix, gguf_prefix)
        self.mlp = MLPLayer(block.mlp, build, hf_prefix, gguf_prefix)
        self.post_mlp_norm = norm("post_mlp_norm")

    def __call__(self, branch: Tensor | None, residual: Tensor, batch: Batch) -> Tensor:
        """``branch`` is None for the first layer, whose input is the residual itself."""
        x = self.input_norm(residual) if branch is None else self.input_norm.add(branch, residual)
        x = self.attention(x, batch)
        if self.post_attention_norm is not None:
            x = self.post_attention_norm(x)
        x = self.mlp(self.pre_mlp_norm.add(self._scaled(x), residual))
        return self._scaled(x if self.post_mlp_norm is None else self.post_mlp_norm(x))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.residual_scale == 1.0 else x * self.residual_scale

    def items(self) -> list[LoadItem]:
        """What the loader must fill."""
        parts = (
            self.input_norm,
            self.attention,
            self.post_attention_norm,
            self.pre_mlp_norm,
            self.mlp,
            self.post_mlp_norm,
        )
        return [item for part in parts if part is not None for item in part.items()]
