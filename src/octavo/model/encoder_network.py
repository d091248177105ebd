"""An encoder as torch executes it: whole texts, padded to the longest of a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.device.ops.bind import Binder, OpSpec
from octavo.files.base import ModelFiles
from octavo.model.encoder import EncoderLayer, EncoderSpec
from octavo.model.layers.build import Build
from octavo.model.layers.linear import LinearLayer
from octavo.model.layers.load import LoadItem
from octavo.model.layers.mlp import PlainMLPLayer
from octavo.model.layers.norm import make_norm
from octavo.model.load import LoadReport, fill, fill_random


class EncoderLayerModule:
    """One layer."""

    def __init__(self, block: EncoderLayer, num_heads: int, build: Build, prefix: str) -> None:
        self.num_heads = num_heads
        self.qkv = LinearLayer(block.qkv, build, prefix, prefix)
        self.output = LinearLayer(block.output, build, prefix, prefix)
        self.attention_norm = make_norm(block.attention_norm, build, prefix, prefix)
        self.mlp = PlainMLPLayer(block.mlp, build, prefix, prefix)
        self.mlp_norm = make_norm(block.mlp_norm, build, prefix, prefix)

    def __call__(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``x`` [B, L, E]; ``mask`` [B, 1, 1, L] is True where there is a token (None: everywhere)."""
        batch, length, size = x.shape
        flat = x.reshape(batch * length, size)
        q, k, v = self.qkv(flat).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        flat = self.attention_norm(flat + self.output(mixed.transpose(1, 2).reshape(batch * length, size)))
        return self.mlp_norm(flat + self.mlp(flat)).view(batch, length, size)

    def items(self) -> list[LoadItem]:
        """What the loader must fill."""
        parts = (self.qkv, self.output, self.attention_norm, self.mlp, self.mlp_norm)
        return [item for part in parts for item in part.items()]


class EncoderNetwork:
    """Parameters are allocated on ``device``, uninitialized; ``load`` fills them."""

    def __init__(
        self, spec: EncoderSpec, *, dtype: torch.dtype, device: torch.device, binder: Binder, op_spec: OpSpec
    ) -> None:
        self.spec = spec
        self.device = device
        build = Build(dtype, device, binder, op_spec, spec.max_length)
        tables = (spec.embedding, spec.positions, spec.types)
        self.tables = [build.empty(table.vocab_size, table.hidden) for table in tables]
        self.norm = make_norm(spec.norm, build)
        self.layers = [
            EncoderLayerModule(layer, spec.num_heads, build, spec.hf_layer_prefix.format(i))
            for i, layer in enumerate(spec.layers)
        ]
        head = spec.classifier
        self.head = (
            [] if head is None else [LinearLayer(part, build, "", "") for part in (head.dense, head.out)]
        )

    def items(self) -> list[LoadItem]:
        """Every tensor the loader must fill."""
        blocks = (self.spec.embedding, self.spec.positions, self.spec.types)
        found = [LoadItem(f"{block.hf}.weight", "", table) for block, table in zip(blocks, self.tables)]
        found += self.norm.items()
        parts: list[EncoderLayerModule | LinearLayer] = [*self.layers, *self.head]
        for part in parts:
            found += part.items()
        return found

    def load(self, files: ModelFiles, progress: Callable[[int, int], None] | None = None) -> LoadReport:
        """See ``Network.load``."""
        if files.format == "dummy":
            return fill_random(self.items(), progress)
        return fill(self.items(), files, self.spec, progress)

    def forward(self, texts: list[Tensor], second_at: list[int]) -> tuple[Tensor, Tensor]:
        """Hidden states [B, L, E] of texts (token ids [n] each), and where there are tokens [B, L].

        ``second_at`` [B] is where the second text of a pair begins; 0 where there is one text.
        """
        lengths = torch.tensor([len(text) for text in texts])
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(self.device)
        there = (torch.arange(ids.shape[1])[None, :] < lengths[:, None]).to(self.device)
        words, positions, types = self.tables
        first = self.spec.first_position
        x = F.embedding(ids, words) + positions[first : first + ids.shape[1]]
        if any(second_at) and len(types) > 1:
            begins = torch.tensor([at or ids.shape[1] for at in second_at], device=self.device)
            x += types[(torch.arange(ids.shape[1], device=self.device) >= begins[:, None]).long()]
        else:
            x += types[0]
        x = self.norm(x.view(-1, x.shape[-1])).view(x.shape)
        mask = None if len(texts) == 1 else there[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        return x, there

    def classify(self, first: Tensor) -> Tensor:
        """The head's numbers [B, labels] of first tokens [B, E]."""
        dense, out = self.head
        return out(torch.tanh(dense(first)))
