"""One decoder layer over a residual stream; the additions are fused into the norms that follow them."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from octavo.model.batch import Batch
from octavo.model.blocks import (
    CompressedAttention,
    FeedForward,
    LatentAttention,
    Layer,
    Mixer,
    MoE,
    Norm,
    PlainMLP,
    Recurrent,
)
from octavo.model.cache import CachePlace
from octavo.model.layers.attention import AttentionLayer
from octavo.model.layers.build import Build
from octavo.model.layers.compressed import CompressedLayer
from octavo.model.layers.latent import LatentLayer
from octavo.model.layers.load import LoadItem
from octavo.model.layers.mlp import GatedMLPLayer, PlainMLPLayer
from octavo.model.layers.moe import MoELayer
from octavo.model.layers.norm import LayerNormLayer, NormLayer, make_norm
from octavo.model.layers.recurrent import RecurrentLayer


class MixerLayer(Protocol):
    """The torch form of a ``blocks.Mixer``."""

    def __call__(self, x: Any, batch: Batch) -> Any:
        """The branch output [T, E] for normed input [T, E]; reads and writes this layer's cache."""

    def bind(self, place: CachePlace) -> None:
        """Take this layer's place in the cache."""

    def items(self) -> list[LoadItem]:
        """What the loader must fill."""


class DecoderLayer:
    """Takes the branch output of the layer before and the residual, returns its own branch output."""

    def __init__(self, block: Layer, build: Build, hf_prefix: str, gguf_prefix: str) -> None:
        def norm(found: Norm | None) -> NormLayer | LayerNormLayer | None:
            return make_norm(found, build, hf_prefix, gguf_prefix) if found is not None else None

        self.residual_scale = block.residual_scale
        self.parallel = block.parallel
        self.input_norm = norm(block.input_norm)
        self.attention = make_mixer(block.attention, build, hf_prefix, gguf_prefix)
        self.post_attention_norm = norm(block.post_attention_norm)
        self.pre_mlp_norm = norm(block.pre_mlp_norm)
        self.mlp = make_mlp(block.mlp, build, hf_prefix, gguf_prefix)
        self.post_mlp_norm = norm(block.post_mlp_norm)
        self._join()

    def _join(self) -> None:
        """fp8 in a plain layer: norms quantize for the projection that follows, and apply the scales of the one before.

        A norm does so only where nothing but additions lies between.
        """
        others = (self.post_attention_norm, self.post_mlp_norm)
        plain = not self.parallel and self.residual_scale == 1.0 and others == (None, None)
        for before, part in ((self.input_norm, self.attention), (self.pre_mlp_norm, self.mlp)):
            if not isinstance(part, AttentionLayer | GatedMLPLayer) or not isinstance(before, NormLayer):
                continue
            if not self.parallel:
                before.next = part.input.fp8
            joined = (
                plain and isinstance(self.input_norm, NormLayer) and isinstance(self.pre_mlp_norm, NormLayer)
            )
            part.leaves_scales = joined

    def __call__(self, branch: Any, residual: Tensor, batch: Batch) -> Any:
        """``branch`` is None for the first layer, whose input is the residual itself."""
        x = entered(self.input_norm, branch, residual)
        mixed = self.attention(x, batch)
        if self.post_attention_norm is not None:
            mixed = self.post_attention_norm(mixed)
        if self.parallel:
            x = self.mlp(x if self.pre_mlp_norm is None else self.pre_mlp_norm(residual))
        else:
            x = self.mlp(entered(self.pre_mlp_norm, self._scaled(mixed), residual))
        if self.post_mlp_norm is not None:
            x = self.post_mlp_norm(x)
        return self._scaled(mixed + x if self.parallel else x)

    def _scaled(self, x: Any) -> Any:
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


def entered(norm: NormLayer | LayerNormLayer | None, branch: Any, residual: Tensor) -> Any:
    """A branch's input: the branch before is added to the residual (in place), then normed where there is a norm."""
    if norm is None:
        return residual if branch is None else residual.add_(branch)
    return norm(residual) if branch is None else norm.add(branch, residual)


def make_mixer(block: Mixer, build: Build, hf_prefix: str, gguf_prefix: str) -> MixerLayer:
    """The layer for a block."""
    if isinstance(block, Recurrent):
        return RecurrentLayer(block, build, hf_prefix, gguf_prefix)
    if isinstance(block, LatentAttention):
        return LatentLayer(block, build, hf_prefix, gguf_prefix)
    if isinstance(block, CompressedAttention):
        return CompressedLayer(block, build, hf_prefix, gguf_prefix)
    return AttentionLayer(block, build, hf_prefix, gguf_prefix)


def make_mlp(
    block: FeedForward, build: Build, hf_prefix: str, gguf_prefix: str
) -> GatedMLPLayer | PlainMLPLayer | MoELayer:
    """The layer for a block."""
    if isinstance(block, MoE):
        return MoELayer(block, build, hf_prefix, gguf_prefix)
    if isinstance(block, PlainMLP):
        return PlainMLPLayer(block, build, hf_prefix, gguf_prefix)
    return GatedMLPLayer(block, build, hf_prefix, gguf_prefix)
