"""What others ask of a network, whoever computes it: our layers (``network``) or transformers' modules (``fallback``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from octavo.files.base import ModelFiles
from octavo.model.batch import Batch
from octavo.model.blocks import DecoderSpec
from octavo.model.cache import CachePlace
from octavo.model.layers.build import Ranks
from octavo.model.layers.load import LoadItem
from octavo.model.load import LoadReport

Classify = Callable[[Tensor], Tensor]


class Computing(Protocol):
    """Loads and computes. ``recordable``: a forward pass never asks the device for a value, so that it can be a graph.
    ``classifier`` makes the numbers [S, labels] of hidden states [S, E], where the model has a head for that."""

    classifier: Classify | None
    spec: DecoderSpec
    dtype: torch.dtype
    recordable: bool
    ranks: Ranks

    def items(self) -> list[LoadItem]:
        """Every tensor the loader must fill."""

    def load(self, files: ModelFiles, progress: Callable[[int, int], None] | None = None) -> LoadReport:
        """Fill every parameter; reports (bytes done, bytes in all). Raises ``ModelFileError`` for what is missing,
        of another shape, or left over."""

    def named(self, files: ModelFiles) -> ModelFiles:
        """The files under the names that ``items`` look for."""

    def bind_cache(self, places: dict[int, CachePlace]) -> None:
        """Give every layer that keeps something its place in the cache."""

    def forward(self, batch: Batch) -> Tensor:
        """Normed hidden states [S, E] of the tokens at ``batch.sample_at``."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[S, V] for hidden states [S, E], in the run type or in float32."""


class Counting(Protocol):
    """Says what a decode step reads, for benchmarks."""

    def matrix_elements(self) -> dict[torch.dtype, int]:
        """Weights in the matrices that every decode step reads, by the type they are stored in."""

    def matrix_bytes(self) -> int:
        """Bytes of those matrices (the floor of a step)."""

    def idle_elements(self, tokens: int) -> dict[torch.dtype, float]:
        """Weights of experts that no token of a step is expected to choose, by type; where all are as likely."""


class AnyNetwork(Computing, Counting, Protocol):
    """Both."""
