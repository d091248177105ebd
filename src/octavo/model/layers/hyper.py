"""A decoder layer over several residual streams; see ``blocks.HyperConnection``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from octavo.device.ops.hyper import HYPER_END, HYPER_ENTER, HYPER_LEAVE, HYPER_LOGITS
from octavo.model.batch import Batch
from octavo.model.blocks import HyperConnection, Layer
from octavo.model.layers.build import Build
from octavo.model.layers.decoder import make_mixer, make_mlp
from octavo.model.layers.load import LoadItem
from octavo.model.layers.moe import MoELayer
from octavo.model.layers.norm import make_norm


class Connection:
    """The torch form of ``blocks.HyperConnection``; its small parameters are float32."""

    def __init__(self, block: HyperConnection, build: Build, hf_prefix: str, gguf_prefix: str) -> None:
        n = block.streams
        outputs, scales = (n, 1) if block.end else ((2 + n) * n, 3)
        self.block = block
        self.fn = build.empty(outputs, n * block.hidden, dtype=torch.float32)
        self.base = build.empty(outputs, dtype=torch.float32)
        self.scale = build.empty(scales, dtype=torch.float32)
        self.names = [
            (hf_prefix + part.hf, gguf_prefix + part.gguf) for part in (block.fn, block.base, block.scale)
        ]
        self.logits = build.binder.bind(HYPER_LOGITS, build.spec)
        self.enter = build.binder.bind(HYPER_ENTER, build.spec)
        self.leave = build.binder.bind(HYPER_LEAVE, build.spec)
        self.end = build.binder.bind(HYPER_END, build.spec)

    def around(self, streams: Tensor, branch: Callable[[Tensor], Tensor]) -> None:
        """streams [T, N, E] read and write a branch of [T, E], in place."""
        block = self.block
        logits = self.logits(streams, self.fn, block.norm_eps)
        entered, weights = self.enter(streams, logits, self.base, self.scale, block.iterations, block.eps)
        self.leave(streams, branch(entered), weights)

    def joined(self, streams: Tensor) -> Tensor:
        """[T, E] of streams [T, N, E], behind the last layer."""
        logits = self.logits(streams, self.fn, self.block.norm_eps)
        out: Tensor = self.end(streams, logits, self.base, self.scale, self.block.eps)
        return out

    def items(self) -> list[LoadItem]:
        """What the loader must fill."""
        targets = (self.fn, self.base, self.scale)
        return [
            LoadItem(*names, target, constant=1.0 if target is self.scale else None)
            for names, target in zip(self.names, targets)
        ]


class HyperLayer:
    """The face of a ``DecoderLayer``; the residual is [T, streams, E] and nothing is left for the next layer to add."""

    def __init__(self, block: Layer, build: Build, hf_prefix: str, gguf_prefix: str) -> None:
        if block.hyper is None or block.input_norm is None or block.pre_mlp_norm is None:
            raise ValueError("a layer with hyper-connections norms what both branches read")
        names = (build, hf_prefix, gguf_prefix)
        self.around_attention, self.around_mlp = (Connection(each, *names) for each in block.hyper)
        self.input_norm = make_norm(block.input_norm, *names)
        self.attention = make_mixer(block.attention, *names)
        self.pre_mlp_norm = make_norm(block.pre_mlp_norm, *names)
        self.mlp = make_mlp(block.mlp, *names)

    def __call__(self, branch: Any, residual: Tensor, batch: Batch) -> None:
        """See ``DecoderLayer``; the residual changes in place."""
        self.around_attention.around(residual, lambda x: self.attention(self.input_norm(x), batch))
        self.around_mlp.around(residual, lambda x: self._mlp(self.pre_mlp_norm(x), batch))

    def _mlp(self, x: Tensor, batch: Batch) -> Tensor:
        out: Tensor = self.mlp(x, batch.token_ids) if isinstance(self.mlp, MoELayer) else self.mlp(x)
        return out

    def items(self) -> list[LoadItem]:
        """What the loader must fill."""
        parts = (
            self.around_attention,
            self.input_norm,
            self.attention,
            self.around_mlp,
            self.pre_mlp_norm,
            self.mlp,
        )
        return [item for part in parts for item in part.items()]
