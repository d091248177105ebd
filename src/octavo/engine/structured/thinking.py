"""Thoughts before the answer: bounded by a budget, and free of the grammar that begins behind them.

BEFORE   the model may open its thoughts with the start token, or answer at once
INSIDE   anything, until the budget is used up: then the end token and nothing else
AFTER    the grammar, or anything where there is none
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto

from octavo.engine.scheduler.sequence import Constraint
from octavo.protocol.generate import Thinking


class _Phase(Enum):
    BEFORE = auto()
    INSIDE = auto()
    AFTER = auto()


class ThinkingConstraint:
    """Implements ``Constraint`` around ``grammar`` (None: only the budget counts).

    Tokens between the two marker tokens count, those in the prompt included. With a grammar an answer cannot end inside
    its thoughts, because it would then lack what the grammar promises. Only the first thoughts are bounded.
    """

    def __init__(
        self,
        thinking: Thinking,
        grammar: Constraint | None,
        *,
        vocab_size: int,
        stop_ids: Iterable[int],
    ) -> None:
        self._start, self._end, self._budget = thinking.start_id, thinking.end_id, thinking.budget
        self._grammar = grammar
        opened = thinking.num_prompt_tokens is not None
        self._phase = _Phase.INSIDE if opened else _Phase.BEFORE
        self._count = thinking.num_prompt_tokens or 0
        # (phase, count) before each accepted token, and whether the grammar saw it.
        self._past: list[tuple[_Phase, int, bool]] = []
        self._forbidden = frozenset(stop_ids) if grammar is not None else frozenset()
        everything = b"\xff" * (4 * ((vocab_size + 31) // 32))
        self._anything = _without(everything, self._forbidden)
        self._only_end = _with(bytes(len(everything)), self._end)

    @property
    def ended(self) -> bool:
        """See ``Constraint.ended``."""
        return self._phase is _Phase.AFTER and self._grammar is not None and self._grammar.ended

    def accept(self, token: int) -> bool:
        """See ``Constraint.accept``."""
        phase, count, asked = self._phase, self._count, False
        if phase is _Phase.INSIDE:
            if token != self._end and (self._is_used_up or token in self._forbidden):
                return False
            if token == self._end:
                self._phase = _Phase.AFTER
            else:
                self._count += 1
        elif phase is _Phase.BEFORE and token == self._start:
            self._phase = _Phase.INSIDE
        elif self._grammar is not None:
            if not self._grammar.accept(token):
                return False
            self._phase, asked = _Phase.AFTER, True
        self._past.append((phase, count, asked))
        return True

    def rewind(self, count: int) -> None:
        """See ``Constraint.rewind``."""
        for _ in range(count):
            self._phase, self._count, asked = self._past.pop()
            if asked and self._grammar is not None:
                self._grammar.rewind(1)

    def mask(self) -> bytes:
        """See ``Constraint.mask``."""
        if self._phase is _Phase.INSIDE:
            return self._only_end if self._is_used_up else self._anything
        if self._grammar is None:
            return self._anything
        words = self._grammar.mask()
        return _with(words, self._start) if self._phase is _Phase.BEFORE else words

    @property
    def _is_used_up(self) -> bool:
        return 0 <= self._budget <= self._count


def _with(words: bytes, token: int) -> bytes:
    changed = bytearray(words)
    changed[token >> 3] |= 1 << (token & 7)
    return bytes(changed)


def _without(words: bytes, tokens: Iterable[int]) -> bytes:
    changed = bytearray(words)
    for token in tokens:
        changed[token >> 3] &= ~(1 << (token & 7))
    return bytes(changed)
