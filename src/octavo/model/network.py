"""A decoder as torch executes it: allocated on the device, loaded by streaming, run on one ``Batch``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.device.ops.bind import Binder, OpSpec
from octavo.files.base import ModelFiles
from octavo.model.batch import Batch
from octavo.model.blocks import DecoderSpec
from octavo.model.cache import CachePlace
from octavo.model.layers.build import ALONE, Build, Ranks
from octavo.model.layers.decoder import DecoderLayer
from octavo.model.layers.linear import LinearLayer
from octavo.model.layers.load import LoadItem
from octavo.model.layers.norm import make_norm
from octavo.model.load import LoadReport, fill, fill_random
from octavo.model.quantization.base import WeightFormat
from octavo.model.quantization.dense import DENSE


class Network:
    """embed -> layers -> norm -> head, for any ``DecoderSpec``."""

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
    ) -> None:
        """Parameters are allocated on ``device``, uninitialized; ``load`` fills them. Where ``ranks.size`` > 1,
        ``spec`` is what ``shard`` made of the model's. ``weight_format`` is that of the layers' projections."""
        self.spec = spec
        build = Build(dtype, device, binder, op_spec, max_position, ranks)
        embedding = spec.embedding
        self.embedding = build.empty(embedding.vocab_size, embedding.hidden)
        positions = spec.positions
        self.positions = (
            build.empty(positions.vocab_size, positions.hidden) if positions is not None else None
        )
        # Rounded to the run type, as the models were trained.
        self.embedding_scale = float(torch.tensor(embedding.scale, dtype=dtype))
        layer_build = replace(build, weight_format=weight_format)
        self.layers = [
            DecoderLayer(layer, layer_build, spec.hf_layer_prefix.format(i), spec.gguf_layer_prefix.format(i))
            for i, layer in enumerate(spec.layers)
        ]
        self.norm = make_norm(spec.norm, build)
        # Quantizing on load leaves the head alone; files may hold it quantized.
        head_build = layer_build if weight_format.covers_head else build
        self.head = LinearLayer(spec.head, head_build, "", "") if spec.head is not None else None
        split = spec.head is not None and spec.head.shard == "column" and ranks.size > 1
        self.gather = ranks.gather if split else None
        self.multiply = build.linear  # of the tied embedding, where there is no head

    def items(self) -> list[LoadItem]:
        """Every tensor the loader must fill."""
        embedding = self.spec.embedding
        found = [LoadItem(f"{embedding.hf}.weight", f"{embedding.gguf}.weight", self.embedding)]
        if self.spec.positions is not None and self.positions is not None:
            names = self.spec.positions
            found.append(LoadItem(f"{names.hf}.weight", f"{names.gguf}.weight", self.positions))
        for layer in self.layers:
            found += layer.items()
        found += self.norm.items()
        return found + (self.head.items() if self.head is not None else [])

    def load(self, files: ModelFiles, progress: Callable[[int, int], None] | None = None) -> LoadReport:
        """Fill every parameter; reports (bytes done, bytes in all). Raises ``ModelFileError`` for what is missing,
        of another shape, or left over."""
        if files.format == "dummy":
            return fill_random(self.items(), progress)
        return fill(self.items(), files, self.spec, progress)

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

    def bind_cache(self, places: dict[int, CachePlace]) -> None:
        """Give every layer that keeps something its place in the cache."""
        for i, place in places.items():
            self.layers[i].attention.bind(place)

    def forward(self, batch: Batch) -> Tensor:
        """Normed hidden states [S, E] of the tokens at ``batch.sample_at``."""
        residual = F.embedding(batch.token_ids, self.embedding)
        if self.embedding_scale != 1.0:
            residual = residual * self.embedding_scale
        if self.positions is not None:
            residual = residual + F.embedding(batch.positions, self.positions)
        branch: Tensor | None = None
        for layer in self.layers:
            branch = layer(branch, residual, batch)
        if branch is None:
            return self.norm(residual[batch.sample_at])
        return self.norm.add(branch[batch.sample_at], residual[batch.sample_at])

    def logits(self, hidden: Tensor) -> Tensor:
        """[S, V] float32 for hidden states [S, E]."""
        out = self.head(hidden) if self.head is not None else self.multiply(hidden, self.embedding, None)
        if self.gather is not None:
            out = self.gather(out)
        out = out.float()
        if self.spec.logit_scale != 1.0:
            out = out * self.spec.logit_scale
        if self.spec.logit_softcap:
            out = torch.tanh(out / self.spec.logit_softcap) * self.spec.logit_softcap
        return out
