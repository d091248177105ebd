"""A transformers model as a ``Network``: its modules compute, our pages keep, our kernel attends.

tokens [1, T] ── embed ── layer: q, k, v ──┐ store k, v ── paged attention ┌── output, MLP ── ... ── hidden [T, E]
                                           └──── interface.attend ─────────┘
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octavo.device.ops.attention import PAGED_ATTENTION
from octavo.device.ops.bind import Binder, OpSpec
from octavo.device.ops.rope_store import ROPE_STORE
from octavo.errors import UnsupportedModelError
from octavo.files.base import ModelFiles
from octavo.model.arch import ArchConfig
from octavo.model.batch import Batch
from octavo.model.cache import CachePlace
from octavo.model.fallback.describe import (
    attention_modules,
    base_of,
    build_model,
    read_config,
    transformers_spec,
)
from octavo.model.fallback.names import renamed
from octavo.model.layers.build import ALONE
from octavo.model.layers.load import LoadItem
from octavo.model.load import LoadReport, fill, fill_random

GATE_UP, DOWN = ".experts.gate_up_proj", ".experts.down_proj"
EACH = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


@dataclass
class Step:
    """The batch that the modules are computing."""

    batch: Batch | None = None
    calls: list[int] = field(default_factory=list)


class PagedLayer:
    """What the attention of one layer does instead of its own."""

    def __init__(
        self, index: int, block: Any, step: Step, binder: Binder, op_spec: OpSpec, dtype: torch.dtype
    ) -> None:
        self.index = index
        self.block = block
        self.step = step
        self.dtype = dtype
        self.store = binder.bind(ROPE_STORE, op_spec)
        self.attend = binder.bind(PAGED_ATTENTION, op_spec)
        self.pages = torch.empty(0)
        self.group = 0

    def bind(self, place: CachePlace) -> None:
        """Take pages [num_pages, 2, Hkv, P, D]."""
        shape = (2, self.block.num_kv_heads, place.spec.page_size, self.block.head_dim)
        self.pages = place.typed(shape, self.dtype)
        self.group = place.group

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None
    ) -> Tensor:
        """q [1, Hq, T, D], k and v [1, Hkv, T, D] -> [1, T, Hq, D]."""
        block, batch = self.block, self.step.batch
        wanted = (block.num_kv_heads, block.head_dim)
        if (
            batch is None
            or (k.shape[1], k.shape[3]) != wanted
            or v.shape != k.shape
            or q.shape[1] != block.num_heads
        ):
            raise UnsupportedModelError(
                f"Layer {self.index} attends with {q.shape[1]} queries on {k.shape[1]} keys of {k.shape[3]} and values of "
                f"{v.shape[3]}, where its configuration says {block.num_heads} on {wanted[0]} of {wanted[1]}.",
                "This model cannot run through transformers here.",
            )
        self.step.calls.append(self.index)
        tables = batch.groups[self.group]
        packed = torch.cat((q, k, v), dim=1)[0].transpose(0, 1).reshape(q.shape[2], -1)
        queries = self.store(
            packed, None, None, 0.0, None, batch.positions, self.pages, tables.slot_mapping, block.num_heads
        )
        mixed: Tensor = self.attend(
            queries,
            self.pages,
            tables.page_table,
            batch.query_start,
            batch.kv_lens,
            batch.max_query,
            batch.max_kv,
            scale,
            window or block.window,
            softcap,
            sinks,
        )
        return mixed.unsqueeze(0)


class Outputs:
    """A base model's output: hidden states, and None for whatever else a model may look for."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


class Given(torch.nn.Module):
    """Stands where the base model was, so that the whole model turns given hidden states into logits its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.empty(0)

    @property
    def decoder(self) -> Given:
        """Some models reach for the decoder inside."""
        return self

    def forward(self, *_: Any, **__: Any) -> Outputs:
        """The hidden states as the base model would return them."""
        return Outputs(self.hidden)


class TransformersNetwork:
    """``face.AnyNetwork``, answered by a transformers model."""

    def __init__(
        self,
        arch: ArchConfig,
        files: ModelFiles,
        *,
        dtype: torch.dtype,
        device: torch.device,
        binder: Binder,
        op_spec: OpSpec,
    ) -> None:
        """Parameters are allocated on ``device``, uninitialized; ``load`` fills them."""
        self.classifier: Callable[[Tensor], Tensor] | None = None
        spec = transformers_spec(arch)
        self.dtype = dtype
        self.ranks = ALONE  # its modules know no other devices
        self.model = build_model(read_config(files), str(device), str(dtype).removeprefix("torch."))
        self.step = Step()
        self.paged = [
            PagedLayer(index, layer.attention, self.step, binder, op_spec, dtype)
            for index, layer in enumerate(spec.layers)
        ]
        for index, module in attention_modules(self.model):
            module.octavo = self.paged[index]
        self.names = self._names()
        # Experts are chosen with the host's help.
        self.recordable: bool = not any(name.endswith((GATE_UP, DOWN)) for name in self.names)
        embedding, head = self.model.get_input_embeddings().weight, self.model.get_output_embeddings()
        self.embedding = embedding
        tied = head is None or head.weight.data_ptr() == embedding.data_ptr()
        self.table = -1 if tied else embedding.data_ptr()  # what a step reads only a few rows of
        self.base, prefix = base_of(self.model), self.model.base_model_prefix
        self.given = Given()
        setattr(self.model, prefix, self.given)
        self.rename = partial(renamed, model=self.model, known=frozenset(self.names))
        ignored = self._ignored(self.named(files))
        self.spec = replace(spec, bare_prefix=f"{prefix}.", ignored=spec.ignored + ignored)

    def _names(self) -> dict[str, Tensor]:
        """Every stored tensor by its name, tied ones once."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in self.model.state_dict().items():
            if tensor.data_ptr() not in seen or tensor.numel() == 0:
                seen.add(tensor.data_ptr())
                found[name] = tensor
        return found

    def _ignored(self, files: ModelFiles) -> tuple[str, ...]:
        """Stored names that transformers says are of no use."""
        patterns = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_unexpected or []]
        return tuple(
            name
            for name in files.tensors
            if name not in self.names and any(pattern.search(name) for pattern in patterns)
        )

    def items(self) -> list[LoadItem]:
        """See ``AnyNetwork``."""
        return [self._item(name, tensor) for name, tensor in self.names.items()]

    def _item(self, name: str, tensor: Tensor) -> LoadItem:
        constant = 1.0 if tensor.dim() == 1 and name.endswith("weight") else None  # of norms
        if name.endswith(GATE_UP) and tensor.dim() == 3:
            halves = tensor.chunk(2, dim=1)
            base, each = name.removesuffix("gate_up_proj"), [(gate, up) for gate, up, _ in EACH]
            ways = tuple(
                tuple(
                    LoadItem(f"{base}{i}.{part}.weight", "", half[i])
                    for i in range(tensor.shape[0])
                    for part, half in zip(parts, halves)
                )
                for parts in each
            )
            return LoadItem(name, "", tensor, ways=((LoadItem(name, "", tensor),), *ways))
        if name.endswith(DOWN) and tensor.dim() == 3:
            base = name.removesuffix("down_proj")
            ways = tuple(
                tuple(LoadItem(f"{base}{i}.{down}.weight", "", tensor[i]) for i in range(tensor.shape[0]))
                for _, _, down in EACH
            )
            return LoadItem(name, "", tensor, ways=((LoadItem(name, "", tensor),), *ways))
        return LoadItem(name, "", tensor, constant=constant)

    def load(self, files: ModelFiles, progress: Callable[[int, int], None] | None = None) -> LoadReport:
        """See ``AnyNetwork``."""
        if files.format == "dummy":
            return fill_random(self.items(), progress)
        return fill(self.items(), self.named(files), self.spec, progress)

    def named(self, files: ModelFiles) -> ModelFiles:
        """See ``AnyNetwork``."""
        return self.rename(files)

    def idle_elements(self, tokens: int) -> dict[torch.dtype, float]:
        """See ``AnyNetwork.idle_elements``; which experts a foreign module has is not known."""
        return {}

    def matrix_elements(self) -> dict[torch.dtype, int]:
        """See ``AnyNetwork``; without a head of its own the embedding is read too."""
        counts: dict[torch.dtype, int] = {}
        for tensor in self.names.values():
            if tensor.dim() >= 2 and tensor.data_ptr() != self.table:
                counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
        return counts

    def matrix_bytes(self) -> int:
        """See ``AnyNetwork``."""
        return sum(count * dtype.itemsize for dtype, count in self.matrix_elements().items())

    def bind_cache(self, places: dict[int, CachePlace]) -> None:
        """See ``AnyNetwork``."""
        for index, place in places.items():
            self.paged[index].bind(place)

    def forward(self, batch: Batch) -> Tensor:
        """See ``AnyNetwork``."""
        self.step.batch = batch
        self.step.calls = []
        out = self.base(
            input_ids=batch.token_ids.unsqueeze(0), position_ids=batch.positions.unsqueeze(0), use_cache=False
        )
        if sorted(self.step.calls) != list(range(len(self.paged))):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does not attend once a layer through transformers' attention interface.",
                "This model cannot run through transformers here.",
            )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden[batch.sample_at]

    def logits(self, hidden: Tensor) -> Tensor:
        """See ``AnyNetwork``; scales and caps are the model's own."""
        self.given.hidden = hidden.unsqueeze(0)
        out: Tensor = self.model(
            input_ids=torch.zeros((1, 1), dtype=torch.int64, device=hidden.device)
        ).logits
        return out[0].float()
