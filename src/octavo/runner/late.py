"""Tokens that another stage of a pipeline draws: on their way while this one computes for other sequences.

stage 0   forward N │ forward N+1, other slots │ tokens of N are needed: wait, then forward N+2
stage 1             │ forward N, draw ─────────┘ forward N+1 ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from torch import Tensor

from octavo.device.platform.base import Platform
from octavo.runner.batch import Prepared
from octavo.runner.slots import Slots

MOST = 4  # older ones have long come


class LateTokens:
    """One step's; ``wait`` is what the exchange returned."""

    def __init__(self, step: Prepared, tokens: Tensor, wait: Callable[[], object]) -> None:
        self.rows = step.rows
        self.where = step.slots
        self.slots = frozenset(step.slots_host.tolist())
        self.tokens = tokens
        self._wait: Callable[[], object] | None = wait

    def settle(self, slots: Slots) -> None:
        """Wait for them, on the device where that can wait by itself, and give them to their slots."""
        if self._wait is not None:
            self._wait()
            self._wait = None
            slots.last_token[self.where] = self.tokens


class LateQueue:
    """Those that have not been settled, oldest first."""

    def __init__(self, slots: Slots, platform: Platform) -> None:
        self._slots = slots
        self._platform = platform
        self._queue: deque[LateTokens] = deque()

    def add(self, step: Prepared, tokens: Tensor, wait: Callable[[], object]) -> LateTokens:
        """A step has been queued."""
        late = LateTokens(step, tokens, wait)
        self._queue.append(late)
        if len(self._queue) > MOST:
            self._queue.popleft().settle(self._slots)
        return late

    def settle_for(self, slots: list[int]) -> None:
        """These slots are about to be used."""
        if self._queue:
            wanted = set(slots)
            while any(late.slots & wanted for late in self._queue):
                self._queue.popleft().settle(self._slots)

    def read(self, late: LateTokens) -> Tensor:
        """Its tokens on the host; those before it are settled too."""
        while late in self._queue:
            self._queue.popleft().settle(self._slots)
        if late.tokens.device.type != "cpu":
            self._platform.synchronize()
        return late.tokens.cpu()
