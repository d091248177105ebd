"""Plans written by hand: sequences in slots 0.., with pages of their own, straight into a runner."""

from __future__ import annotations

from octavo.engine.cache.spec import ceil_div
from octavo.engine.executor.base import Runner
from octavo.errors import UsageError
from octavo.protocol.generate import SamplingParams
from octavo.protocol.plan import PageWrite, SlotInit, StepPlan


class Feeder:
    """Plans for ``rows`` sequences of at most ``room`` tokens; ``sampling`` belongs to all of them."""

    def __init__(self, runner: Runner, rows: int, room: int, sampling: SamplingParams) -> None:
        self.rows, self.sampling, self.step = rows, sampling, 0
        self.writes, page = list[PageWrite](), 0
        for slot in range(rows):
            for index, group in enumerate(runner.layout.groups):
                count = ceil_div(room, group.spec.page_size)
                self.writes.append(PageWrite(index, slot, 0, list(range(page, page + count))))
                page += count
        if page > runner.num_pages:
            raise UsageError(
                f"{rows} sequences of {room} tokens need {page} pages; there are {runner.num_pages}."
            )

    def plan(
        self, starts: list[int], counts: list[int], histories: list[list[int]] | None = None
    ) -> StepPlan:
        """Every sequence computes some tokens and samples; with ``histories`` these become what is known of it."""
        every, writes = list(range(self.rows)), self.writes if self.step == 0 else []
        self.step += 1
        admits = [
            SlotInit(slot, tokens, len(tokens), self.sampling, slot, [])
            for slot, tokens in enumerate(histories or [])
        ]
        sampled = [True] * self.rows
        return StepPlan(self.step, every, starts, counts, [0] * self.rows, sampled, admits, writes, [])
