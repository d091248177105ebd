"""DRY ("don't repeat yourself", p-e-w 2024): a token that would lengthen a repetition becomes the less likely the longer it is.

    t = ... a b c x ... a b c        the last three tokens stood before x already: x costs multiplier * base ** (3 - allowed)

A repetition ends at a breaker. Beside a text of n tokens a step looks at the places where its last token stood before.
"""

from __future__ import annotations

from collections.abc import Sequence

from octavo.engine.scheduler.sequence import Constraint
from octavo.protocol.generate import Dry

MOST_PLACES = 1024  # of one token, the latest
MOST_LENGTH = 64  # longer repetitions cost no more
MOST_PENALTY = 10_000.0  # logits may be half precision
KEPT = 256  # states that ``rewind`` can go back to


class DryPenalty:
    """Implements ``Constraint`` around ``inner`` (None: nothing is forbidden); ``penalties`` go beside its masks."""

    def __init__(self, dry: Dry, tokens: Sequence[int], inner: Constraint | None) -> None:
        self._dry = dry
        self._inner = inner
        self._breakers = frozenset(dry.breakers)
        self._tokens = list(tokens)
        self._places: dict[int, list[int]] = {}  # token: where it stands
        self._lengths: dict[
            int, int
        ] = {}  # place: how many tokens before it are those at the end of the text
        self._past: list[dict[int, int]] = []
        for place, token in enumerate(tokens):
            self._places.setdefault(token, []).append(place)
        if tokens:
            *before, _ = self._places[tokens[-1]]
            self._lengths = {place + 1: self._common(place + 1) for place in before[-MOST_PLACES:]}

    @property
    def ended(self) -> bool:
        """See ``Constraint.ended``."""
        return self._inner is not None and self._inner.ended

    def accept(self, token: int) -> bool:
        """See ``Constraint.accept``."""
        if self._inner is not None and not self._inner.accept(token):
            return False
        self._append(token)
        return True

    def rewind(self, count: int) -> None:
        """See ``Constraint.rewind``."""
        for _ in range(count):
            self._places[self._tokens.pop()].pop()
            self._lengths = self._past.pop()
        if self._inner is not None:
            self._inner.rewind(count)

    def mask(self) -> bytes:
        """See ``Constraint.mask``; b"" where nothing is forbidden."""
        return b"" if self._inner is None else self._inner.mask()

    def penalties(self) -> dict[int, float]:
        """What is taken from the logits of the next token."""
        dry, found = self._dry, dict[int, float]()
        for place, length in self._lengths.items():
            if length >= dry.allowed_length and place < len(self._tokens):
                token = self._tokens[place]
                over = min(length, MOST_LENGTH) - dry.allowed_length
                cost = min(dry.multiplier * dry.base**over, MOST_PENALTY) if over >= 0 else 0.0
                if token not in self._breakers:
                    found[token] = max(found.get(token, 0.0), cost)
        return found

    def _common(self, place: int) -> int:
        """How many tokens before ``place`` are those at the end of the text, up to a breaker."""
        tokens, end, length = self._tokens, len(self._tokens), 0
        while length < min(place, MOST_LENGTH):
            token = tokens[end - 1 - length]
            if token in self._breakers or tokens[place - 1 - length] != token:
                break
            length += 1
        return length

    def _append(self, token: int) -> None:
        self._past.append(self._lengths)
        if len(self._past) > 2 * KEPT:
            del self._past[:KEPT]
        places = self._places.setdefault(token, [])
        if token in self._breakers:
            self._lengths = {}
        else:
            before = self._lengths
            self._lengths = {place + 1: before.get(place, 0) + 1 for place in places[-MOST_PLACES:]}
        places.append(len(self._tokens))
        self._tokens.append(token)
