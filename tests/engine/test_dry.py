"""DRY's penalties against the definition, computed the slow way; and what drafts do to its memory."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.structured import dry as room
from octavo.engine.structured.dry import DryPenalty
from octavo.protocol.generate import Dry

texts = st.lists(st.integers(0, 3), max_size=40)


def slow(dry: Dry, tokens: list[int]) -> dict[int, float]:
    """For every earlier place: how many tokens before it are the last ones of the text."""
    found: dict[int, float] = {}
    for place in range(1, len(tokens)):
        length = 0
        while length < place:
            token = tokens[len(tokens) - 1 - length]
            if token in dry.breakers or tokens[place - 1 - length] != token:
                break
            length += 1
        if length >= dry.allowed_length and tokens[place] not in dry.breakers:
            over = min(length, room.MOST_LENGTH) - dry.allowed_length
            cost = min(dry.multiplier * dry.base**over, room.MOST_PENALTY)
            found[tokens[place]] = max(found.get(tokens[place], 0.0), cost)
    return found


@settings(max_examples=150, deadline=None)
@given(prompt=texts, answer=texts, allowed=st.integers(1, 4), breakers=st.sets(st.integers(0, 3), max_size=2))
def test_penalties_are_those_of_the_definition(
    prompt: list[int], answer: list[int], allowed: int, breakers: set[int]
) -> None:
    dry = Dry(0.8, 1.75, allowed, sorted(breakers))
    made = DryPenalty(dry, prompt, None)
    tokens = list(prompt)
    assert made.penalties() == slow(dry, tokens)
    for token in answer:
        assert made.accept(token)
        tokens.append(token)
        assert made.penalties() == slow(dry, tokens)
    back = len(answer) // 2
    made.rewind(back)
    assert made.penalties() == slow(dry, tokens[: len(tokens) - back])
    assert made.mask() == b"" and not made.ended


def test_work_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    made = DryPenalty(Dry(1.0, 2.0, 2, []), [7] * 200_000, None)
    assert len(made._lengths) == room.MOST_PLACES
    for _ in range(3 * room.KEPT):
        made.accept(7)
    assert len(made._lengths) == room.MOST_PLACES and len(made._past) <= 2 * room.KEPT
    assert made.penalties() == {7: room.MOST_PENALTY}


class Odd:
    """A grammar that forbids even tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    @property
    def ended(self) -> bool:
        return len(self.tokens) == 2

    def accept(self, token: int) -> bool:
        if token % 2:
            self.tokens.append(token)
        return bool(token % 2)

    def rewind(self, count: int) -> None:
        del self.tokens[len(self.tokens) - count :]

    def mask(self) -> bytes:
        return b"\xaa\xaa\xaa\xaa"


def test_a_grammar_inside_is_asked_first() -> None:
    made = DryPenalty(Dry(1.0, 2.0, 1, []), [1, 3, 1], Odd())
    assert made.mask() == b"\xaa\xaa\xaa\xaa" and made.penalties() == {3: 1.0}
    assert not made.accept(2) and made.penalties() == {3: 1.0}
    assert made.accept(3) and made.penalties() == {1: 2.0}
    assert not made.ended and made.accept(1) and made.ended
    made.rewind(2)
    assert not made.ended and made.penalties() == {3: 1.0}
