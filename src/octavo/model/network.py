"""A decoder as torch executes it: allocated on the device, loaded by streaming, run on one ``Batch``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.device.kernels.rows import Raw
from octavo.device.ops.bind import Binder, OpSpec
from octavo.device.ops.fp8 import settled
from octavo.files.base import ModelFiles
from octavo.model.batch import Batch
from octavo.model.blocks import DecoderSpec, MoE
from octavo.model.cache import CachePlace
from octavo.model.layers.build import ALONE, AS_RUN, Build, CacheType, Ranks
from octavo.model.layers.decoder import DecoderLayer
from octavo.model.layers.hyper import Connection, HyperLayer
from octavo.model.layers.linear import LinearLayer
from octavo.model.layers.load import LoadItem
from octavo.model.layers.moe import MoELayer
from octavo.model.layers.norm import make_norm
from octavo.model.load import LoadReport, fill, fill_random
from octavo.model.quantization.base import WeightFormat
from octavo.model.quantization.dense import DENSE


@dataclass(frozen=True)
class Pipe:
    """The neighbours of a pipeline stage: ``receive`` fills a tensor [2, T, E], ``send`` passes one on;
    [T, streams, E] where there are several residual streams."""

    receive: Callable[[Tensor], Tensor] | None = None
    send: Callable[[Tensor], None] | None = None


NO_PIPE = Pipe()


class Network:
    """embed -> layers -> norm -> head, for any ``DecoderSpec``."""

    recordable = True  # a forward pass never asks the device for a value, so that it can become a graph

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        dtype: torch.dtype,
        device: torch.device,
        binder: Binder,
        op_spec: OpSpec,
        max_position: int,
        ranks: Ranks = ALONE,
        weight_format: WeightFormat = DENSE,
        pipe: Pipe = NO_PIPE,
        cache_type: CacheType = AS_RUN,
    ) -> None:
        """Parameters are allocated on ``device``, uninitialized; ``load`` fills them. Where ``ranks.size`` > 1,
        ``spec`` is what ``shard`` made of the model's. ``weight_format`` is that of the layers' projections. A stage that
        is not the first or not the last needs its ``pipe``."""
        self.spec = spec
        self.dtype = dtype
        self.ranks = ranks
        self.pipe = pipe
        build = Build(dtype, device, binder, op_spec, max_position, ranks, cache_type=cache_type)
        embedding = spec.embedding
        tied = spec.head is None and spec.is_last
        self.embedding = build.empty(embedding.vocab_size if spec.is_first or tied else 0, embedding.hidden)
        positions = spec.positions if spec.is_first else None
        self.positions = (
            build.empty(positions.vocab_size, positions.hidden) if positions is not None else None
        )
        # Rounded to the run type, as the models were trained.
        self.embedding_scale = float(torch.tensor(embedding.scale, dtype=dtype))
        layer_build = replace(build, weight_format=weight_format)
        self.layers = [
            (HyperLayer if layer.hyper is not None else DecoderLayer)(
                layer, layer_build, spec.hf_layer_prefix.format(i), spec.gguf_layer_prefix.format(i)
            )
            for i, layer in enumerate(spec.layers, spec.first_layer)
        ]
        self.join = (
            Connection(spec.streams, build, "", "") if spec.streams is not None and spec.is_last else None
        )
        self.norm = make_norm(spec.norm, layer_build)
        # Quantizing on load leaves the head alone; files may hold it quantized.
        head_build = layer_build if weight_format.covers_head else build
        self.head = LinearLayer(spec.head, head_build, "", "") if spec.head is not None else None
        scores = LinearLayer(spec.classifier, build, "", "") if spec.classifier is not None else None
        self.classifier: Callable[[Tensor], Tensor] | None = scores
        self.heads = [head for head in (self.head, scores) if head is not None]
        split = spec.head is not None and spec.head.shard == "column" and ranks.size > 1
        self.multiply = build.linear  # of the tied embedding, where there is no head
        self.tied = self.embedding
        if tied and ranks.size > 1 and embedding.vocab_size % ranks.size == 0:
            split = True  # every rank has all of it, but multiplies its share
            self.tied = self.embedding.chunk(ranks.size)[ranks.rank]
        self.gather = ranks.gather if split else None

    def items(self) -> list[LoadItem]:
        """Every tensor the loader must fill."""
        embedding = self.spec.embedding
        found = []
        if len(self.embedding):
            found.append(LoadItem(f"{embedding.hf}.weight", f"{embedding.gguf}.weight", self.embedding))
        if self.spec.positions is not None and self.positions is not None:
            names = self.spec.positions
            found.append(LoadItem(f"{names.hf}.weight", f"{names.gguf}.weight", self.positions))
        for layer in self.layers:
            found += layer.items()
        if self.spec.is_last:
            found += self.norm.items()
        if self.join is not None:
            found += self.join.items()
        for head in self.heads:
            found += head.items()
        return found

    def load(self, files: ModelFiles, progress: Callable[[int, int], None] | None = None) -> LoadReport:
        """Fill every parameter; reports (bytes done, bytes in all). Raises ``ModelFileError`` for what is missing,
        of another shape, or left over."""
        if files.format == "dummy":
            return fill_random(self.items(), progress)
        elsewhere = [
            name
            for layer in self.layers
            if isinstance(layer.mlp, MoELayer)
            for name in layer.mlp.experts.elsewhere()
        ]
        spec = replace(self.spec, ignored_prefixes=(*self.spec.ignored_prefixes, *elsewhere))
        return fill(self.items(), files, spec, progress)

    def named(self, files: ModelFiles) -> ModelFiles:
        """The files under the names that ``items`` look for."""
        return files

    def matrix_elements(self) -> dict[torch.dtype, int]:
        """Weights in the matrices that every decode step reads, by the type they are stored in."""
        counts: dict[torch.dtype, int] = {}
        for item in self.items():
            if item.target.dim() >= 2:
                dtype = item.target.dtype if item.home is None else item.home.dtype
                counts[dtype] = counts.get(dtype, 0) + item.target.numel()
        for table in (self.embedding if self.head is not None else None, self.positions):
            if table is not None:
                counts[table.dtype] -= table.numel()
        return counts

    def matrix_bytes(self) -> int:
        """Bytes of those matrices (the floor of a step)."""
        tables = (self.embedding if self.head is not None else None, self.positions)
        unread = sum(table.numel() * table.element_size() for table in tables if table is not None)
        return sum(item.num_bytes for item in self.items() if item.target.dim() >= 2) - unread

    def idle_elements(self, tokens: int) -> dict[torch.dtype, float]:
        """Weights of experts that no token of a step is expected to choose, by type; where all are as likely."""
        counts: dict[torch.dtype, float] = {}
        for layer, block in zip(self.layers, self.spec.layers):
            if isinstance(block.mlp, MoE):
                missed = (1 - block.mlp.router.top_k / block.mlp.experts.num) ** tokens
                for stacked in [item.target for item in layer.mlp.items() if item.target.dim() == 3]:
                    counts[stacked.dtype] = counts.get(stacked.dtype, 0.0) + missed * stacked.numel()
        return counts

    def bind_cache(self, places: dict[int, CachePlace]) -> None:
        """Give every layer that keeps something its place in the cache."""
        for i, place in places.items():
            self.layers[i - self.spec.first_layer].attention.bind(place)

    def forward(self, batch: Batch) -> Tensor:
        """Normed hidden states [S, E] of the tokens at ``batch.sample_at``; of a stage that is not the last, tensors of
        that shape, while what counts went through the pipe."""
        branch: Tensor | Raw | None
        branch, residual = self._enter(batch)
        for layer in self.layers:
            branch = layer(branch, residual, batch)
        if self.pipe.send is not None:
            self.pipe.send(residual if branch is None else torch.stack((settled(branch), residual)))
            return residual[batch.sample_at] if self.spec.streams is None else residual[batch.sample_at, 0]
        if self.join is not None:
            return self.norm(self.join.joined(residual[batch.sample_at]))
        if branch is None:
            return self.norm(residual[batch.sample_at])
        last = branch.take(batch.sample_at) if isinstance(branch, Raw) else branch[batch.sample_at]
        normed: Tensor = self.norm.add(last, residual[batch.sample_at])
        return normed

    def _enter(self, batch: Batch) -> tuple[Tensor | None, Tensor]:
        """What goes into the first layer: (the branch before it, None for the model's first; the residual) [T, E], the
        latter [T, streams, E] where there are several."""
        if self.pipe.receive is not None:
            tokens, hidden = batch.token_ids.shape[0], self.spec.embedding.hidden
            if self.spec.streams is not None:
                streams = self.embedding.new_empty(tokens, self.spec.streams.streams, hidden)
                return None, self.pipe.receive(streams)
            received = self.pipe.receive(self.embedding.new_empty(2, tokens, hidden))
            return received[0], received[1]
        residual = F.embedding(batch.token_ids, self.embedding)
        if self.embedding_scale != 1.0:
            residual = residual * self.embedding_scale
        if self.positions is not None:
            residual = residual + F.embedding(batch.positions, self.positions)
        if self.spec.streams is not None:
            residual = residual.unsqueeze(1).repeat(1, self.spec.streams.streams, 1)
        return None, residual

    def logits(self, hidden: Tensor) -> Tensor:
        """[S, V] for hidden states [S, E]: as the head computes them, float32 where they are scaled or capped."""
        out = self.head(hidden) if self.head is not None else self.multiply(hidden, self.tied, None)
        if self.gather is not None:
            out = self.gather(out)
        if self.spec.logit_scale != 1.0 or self.spec.logit_softcap:
            out = out.float()
        if self.spec.logit_scale != 1.0:
            out = out * self.spec.logit_scale
        if self.spec.logit_softcap:
            out = torch.tanh(out / self.spec.logit_softcap) * self.spec.logit_softcap
        return out
