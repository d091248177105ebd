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
            self._texts[init.slot] = Text(torch.tensor(init.token_ids, dtype=torch.int64), init.pooling)
        ends = np.asarray(plan.starts) + np.asarray(plan.num_tokens)
        complete = [
            row for row, slot in enumerate(plan.slots) if ends[row] == len(self._text(slot).token_ids)
        ]
        self._current = plan
        self._vectors = [(rows, self._read(rows, plan)) for rows in self._batches(complete, plan)]

    def sample(self, masks: list[GrammarMask]) -> None:
        """See ``Runner.sample``; nothing is drawn."""
        plan = self._current
        if plan is None:
            raise RuntimeError("sample() without forward()")
        self._current = None
        result = StepResult(plan.step, [[] for _ in plan.slots])
        rows = [row for batch, _ in self._vectors for row in batch]
        if rows:
            values = torch.cat([vectors for _, vectors in self._vectors]).cpu()
            PendingVectors(rows, values).into(result)
        self._ready.append(result)

    def collect(self) -> StepResult:
        """See ``Runner.collect``."""
        return self._ready.popleft()

    def close(self) -> None:
        """See ``Runner.close``."""
        self._ready.clear()
        self._texts.clear()
        self.platform.close()

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

    def _read(self, rows: list[int], plan: StepPlan) -> Tensor:
        """Vectors [R, E] float32 of complete rows."""
        texts = [self._text(plan.slots[row]) for row in rows]
        hidden, there = self.network.forward([text.token_ids for text in texts])
        hidden = hidden.float()
        counts = there.sum(dim=1)
        vectors = []
        for i, text in enumerate(texts):
            if text.pooling == "cls":
                vectors.append(hidden[i, 0])
            elif text.pooling == "last":
                vectors.append(hidden[i, counts[i] - 1])
            else:
                vectors.append(hidden[i, : counts[i]].mean(dim=0))
        return torch.stack(vectors)
