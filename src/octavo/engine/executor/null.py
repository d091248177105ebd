"""A runner that computes nothing: tests, the scheduler's benchmark, a server without a model.

The token at position p of a sequence with seed s is a fixed function of (s, p), so answers are the same alone,
batched, chunked, preempted and on any process layout.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable

from octavo.engine.cache.layout import CacheLayout
from octavo.protocol.plan import GrammarMask, SlotInit, StepPlan, StepResult

# token(init, position) for the sequence that ``init`` brought into its slot.
Script = Callable[[SlotInit, int], int]


def null_token(seed: int, position: int, vocab_size: int) -> int:
    """The pseudo-random token at a position (a multiplicative hash; any number would do)."""
    return ((seed ^ (position * 0x9E3779B1)) * 0x85EBCA6B >> 13) % vocab_size


def null_vector(token_ids: list[int]) -> bytes:
    """The vector of a pooled sequence: how many tokens, their sum, the last one, and 1."""
    return struct.pack("<4f", len(token_ids), sum(token_ids), token_ids[-1], 1.0)


class NullRunner:
    """Implements ``engine.executor.base.Runner`` without maths.

    ``script`` replaces the pseudo-random tokens. ``eos_rate`` ends sequences: that share of the draws gives the
    sequence's smallest stop token. ``num_drafts`` claims drafts in every decode row, of which the runner accepts a
    changing number.
    """

    def __init__(
        self,
        layout: CacheLayout,
        *,
        num_pages: int,
        num_slots: int,
        vocab_size: int,
        script: Script | None = None,
        eos_rate: float = 0.0,
        num_drafts: int = 0,
    ) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.num_slots = num_slots
        self.vocab_size = vocab_size
        self.num_drafts = num_drafts
        self.closed = False
        self._script = script
        self._eos_below = int(eos_rate * 1_000_000)
        self._slots: dict[int, SlotInit] = {}
        self._known: dict[int, int] = {}
        self._plan: StepPlan | None = None
        self._ready: deque[StepResult] = deque()

    def forward(self, plan: StepPlan) -> None:
        """See ``Runner.forward``."""
        for init in plan.admits:
            self._slots[init.slot] = init
            self._known[init.slot] = len(init.token_ids)
        self._plan = plan

    def sample(self, masks: list[GrammarMask]) -> None:
        """See ``Runner.sample``; masks are ignored, so a null engine serves no grammars."""
        plan = self._plan
        if plan is None:
            raise RuntimeError("sample() without forward()")
        self._plan = None
        tokens: list[list[int]] = []
        pooled: dict[int, bytes] = {}
        columns = zip(plan.slots, plan.num_drafts, plan.sample)
        for row, (slot, drafts, sample) in enumerate(columns):
            if not sample:
                tokens.append([])
                init = self._slots[slot]
                if init.pooling is not None and plan.starts[row] + plan.num_tokens[row] == init.num_prompt:
                    pooled[row] = null_vector(init.token_ids)
                continue
            init, first = self._slots[slot], self._known[slot]
            count = 1 + first % (drafts + 1)
            self._known[slot] = first + count
            tokens.append([self._token(init, position) for position in range(first, first + count)])
        drafts_ready = [self.num_drafts] * len(tokens) if self.num_drafts else []
        self._ready.append(StepResult(plan.step, tokens, drafts_ready, pooled=pooled or None))

    def collect(self) -> StepResult:
        """See ``Runner.collect``."""
        return self._ready.popleft()

    def close(self) -> None:
        """See ``Runner.close``."""
        self.closed = True
        self._ready.clear()

    def _token(self, init: SlotInit, position: int) -> int:
        if self._script is not None:
            return self._script(init, position)
        ends = self._eos_below and null_token(init.seed + 1, position, 1_000_000) < self._eos_below
        if ends and init.stop_token_ids:
            return init.stop_token_ids[0]
        return null_token(init.seed, position, self.vocab_size)
