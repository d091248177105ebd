"""A step that finds no memory must not end the server: give cached memory back, try again, then in halves.

Rows are independent of each other, and a row that is computed again writes the same keys and values to the same pages,
so a step may be repeated and cut as one likes. Only a row that does not fit alone fails, with a message of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from octavo.protocol.plan import StepPlan
from octavo.runner.batch import Prepared

T = TypeVar("T")
MESSAGE = (
    "The device has no memory left for this request. Another program may have taken it; ask for fewer log "
    "probabilities or a shorter prompt, or start with a lower --gpu-memory-utilization."
)


def attempt(work: Callable[[], T], release: Callable[[], None], times: int = 2) -> T | None:
    """``work()``; where memory is short, again after ``release``; None after so many ``times``."""
    for _ in range(times):
        try:
            return work()
        except torch.OutOfMemoryError:
            pass  # what the traceback holds must be gone before memory is given back
        release()
    return None


def rows_of(plan: StepPlan, rows: list[int]) -> StepPlan:
    """Some rows of a plan whose admissions, page writes and page operations were carried out already."""
    return StepPlan(
        plan.step,
        [plan.slots[row] for row in rows],
        [plan.starts[row] for row in rows],
        [plan.num_tokens[row] for row in rows],
        [plan.num_drafts[row] for row in rows],
        [plan.sample[row] for row in rows],
        [],
        [],
        [],
    )


def part_of(step: Prepared, begin: int, end: int) -> Prepared:
    """The sampling rows ``begin`` to ``end`` of a step."""
    return replace(
        step,
        rows=step.rows[begin:end],
        slots_host=step.slots_host[begin:end],
        positions_host=step.positions_host[begin:end],
        slots=step.slots[begin:end],
        positions=step.positions[begin:end],
    )


class Parts:
    """Hidden states of a plan, computed in as many parts as memory asks for."""

    def __init__(
        self,
        build: Callable[[StepPlan], Prepared],
        forward: Callable[[Prepared], Tensor],
        release: Callable[[], None],
    ) -> None:
        self.build = build
        self.forward = forward
        self.release = release
        self.sampling: list[Tensor] = []
        self.prompts: list[Tensor] = []
        self.pooled: list[Tensor] = []
        self.errors: dict[int, str] = {}

    def run(self, plan: StepPlan, width: int, dtype: torch.dtype) -> Tensor:
        """Like the network's forward pass over the whole plan; failed rows (``errors``) are zeros."""
        self._run(plan, list(range(plan.num_rows)), width, dtype)
        return torch.cat([*self.sampling, *self.prompts, *self.pooled])

    def _run(self, plan: StepPlan, rows: list[int], width: int, dtype: torch.dtype) -> None:
        step = self.build(rows_of(plan, rows))
        hidden = attempt(lambda: self.forward(step), self.release, times=1)
        if hidden is None and len(rows) > 1:
            half = len(rows) // 2
            self._run(plan, rows[:half], width, dtype)
            self._run(plan, rows[half:], width, dtype)
            return
        if hidden is None:
            self.errors[rows[0]] = MESSAGE
            sampled = step.batch.token_ids[step.batch.sample_at]
            hidden = torch.zeros((len(sampled), width), dtype=dtype, device=sampled.device)
        first = len(step.rows)
        second = first + sum(count for _, _, count in step.prompt_rows)
        self.sampling.append(hidden[:first])
        self.prompts.append(hidden[first:second])
        self.pooled.append(hidden[second:])
