"""Runs encoders: a text's tokens arrive in rows like any prompt; when the last is there, all are read at once."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octavo.device.platform.base import Platform
from octavo.engine.cache.layout import CacheLayout
from octavo.model.encoder_network import EncoderNetwork
from octavo.protocol.generate import Pooling
from octavo.protocol.plan import GrammarMask, StepPlan, StepResult
from octavo.runner.pooling import PendingVectors


@dataclass(frozen=True)
class Text:
    """What a slot holds."""

    token_ids: Tensor
    pooling: Pooling
    second_at: int


class EncoderRunner:
    """Implements ``engine.executor.base.Runner``; there is no cache, so a slot is all a sequence needs.

    ``max_tokens`` bounds a batch with its padding.
    """

    def __init__(
        self, network: EncoderNetwork, platform: Platform, *, num_slots: int, max_tokens: int
    ) -> None:
        self.network = network
        self.platform = platform
        self.layout = CacheLayout((), 0, 0)
        self.num_pages = 0
        self.num_slots = num_slots
        self.max_tokens = max_tokens
        self._texts: dict[int, Text] = {}
        self._current: StepPlan | None = None
        self._vectors: list[tuple[list[int], Tensor]] = []
        self._ready: deque[StepResult] = deque()

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> None:
        """See ``Runner.forward``."""
        for init in plan.admits:
            if init.pooling is None:
                raise RuntimeError("an encoder was asked to generate")
            ids = torch.tensor(init.token_ids, dtype=torch.int64)
            self._texts[init.slot] = Text(ids, init.pooling, init.second_at)
        ends = np.asarray(plan.starts) + np.asarray(plan.num_tokens)
        # What comes out has another shape for each of these kinds, so they are batched apart.
        complete: dict[str, list[int]] = {}
        for row, slot in enumerate(plan.slots):
            text = self._text(slot)
            if ends[row] == len(text.token_ids):
                kind = text.pooling if text.pooling in ("classify", "tokens") else "vector"
                complete.setdefault(kind, []).append(row)
        self._current = plan
        self._vectors = [
            made
            for of_kind in complete.values()
            for rows in self._batches(of_kind, plan)
            for made in self._read(rows, plan)
        ]

    def sample(self, masks: list[GrammarMask]) -> None:
        """See ``Runner.sample``; nothing is drawn."""
        plan = self._current
        if plan is None:
            raise RuntimeError("sample() without forward()")
        self._current = None
        result = StepResult(plan.step, [[] for _ in plan.slots])
        for rows, vectors in self._vectors:
            PendingVectors(rows, vectors.cpu()).into(result)
        self._ready.append(result)

    def collect(self) -> StepResult:
        """See ``Runner.collect``."""
        return self._ready.popleft()

    def close(self) -> None:
        """See ``Runner.close``."""
        self._ready.clear()
        self._texts.clear()
        self.platform.release()

    def _text(self, slot: int) -> Text:
        return self._texts[slot]

    def _batches(self, rows: list[int], plan: StepPlan) -> list[list[int]]:
        """Rows in batches of texts of about the same length."""
        batches: list[list[int]] = []
        room = 0
        for row in sorted(rows, key=lambda row: -len(self._text(plan.slots[row]).token_ids)):
            length = len(self._text(plan.slots[row]).token_ids)  # the first of a batch is its longest
            if room <= 0:
                batches.append([])
                room = max(1, self.max_tokens // length)
            batches[-1].append(row)
            room -= 1
        return batches

    def _read(self, rows: list[int], plan: StepPlan) -> list[tuple[list[int], Tensor]]:
        """Vectors [R, E] float32 of complete rows, together or (of all tokens [1, n x E]) one by one."""
        texts = [self._text(plan.slots[row]) for row in rows]
        hidden, there = self.network.forward(
            [text.token_ids for text in texts], [text.second_at for text in texts]
        )
        if texts[0].pooling == "classify":
            return [(rows, self.network.classify(hidden[:, 0]).float())]
        hidden = hidden.float()
        counts = there.sum(dim=1)
        if texts[0].pooling == "tokens":
            return [([row], hidden[i, : counts[i]].reshape(1, -1)) for i, row in enumerate(rows)]
        vectors = []
        for i, text in enumerate(texts):
            if text.pooling == "cls":
                vectors.append(hidden[i, 0])
            elif text.pooling == "last":
                vectors.append(hidden[i, counts[i] - 1])
            else:
                vectors.append(hidden[i, : counts[i]].mean(dim=0))
        return [(rows, torch.stack(vectors))]
