"""One vector out of a sequence's hidden states, gathered over the chunks of its prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octavo.protocol.plan import SlotInit, StepResult
from octavo.runner.batch import Prepared


@dataclass
class PendingVectors:
    """Vectors on their way to the host: a plan row for each line of ``values`` [R, E] float32."""

    rows: list[int]
    values: Tensor

    def into(self, result: StepResult) -> None:
        """Write the vectors into the step's result, when the copy has arrived; one that is not finite is an error."""
        result.pooled = dict(result.pooled or {})
        for row, vector in zip(self.rows, self.values.numpy()):
            if np.isfinite(vector).all():
                result.pooled[row] = vector.tobytes()
            else:
                result.errors = {**(result.errors or {}), row: "The model produced NaN for this request."}


class Pooler:
    """Sums by slot."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}

    def admit(self, admits: list[SlotInit]) -> None:
        """New sequences (or preempted ones, from their beginning) move into slots."""
        for init in admits:
            self._sums.pop(init.slot, None)
            self._counts.pop(init.slot, None)

    def add(self, step: Prepared, slots: list[int], hidden: Tensor) -> tuple[list[int], Tensor]:
        """Take in the hidden states [N, E] of a step's ``pooled_rows``; returns the rows that are complete and their
        vectors [R, E]."""
        rows: list[int] = []
        vectors: list[Tensor] = []
        at = 0
        for pooled in step.pooled_rows:
            slot = slots[pooled.row]
            count = pooled.count
            part = hidden[at : at + count].float().sum(dim=0)
            at += count
            if slot in self._sums:
                part = part + self._sums[slot]
                count += self._counts[slot]
            if pooled.is_last:
                self._sums.pop(slot, None)
                self._counts.pop(slot, None)
                rows.append(pooled.row)
                vectors.append(part / max(1, count))
            else:
                self._sums[slot], self._counts[slot] = part, count
        return rows, torch.stack(vectors) if vectors else hidden[:0].float()
