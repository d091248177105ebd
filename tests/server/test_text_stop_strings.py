"""Stop strings: the same result however the text is cut, and nothing held back that could be shown."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.api.text.stop_strings import StopMatcher


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Grow the text by one character at a time; stop where it ends with a stop string."""
    for end in range(1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


def longest_start(text: str, stops: list[str]) -> int:
    """Length of the longest end of ``text`` that a stop string starts with."""
    return max(
        (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
    )


@settings(deadline=None, max_examples=400)
@given(
    pieces=st.lists(st.text("abc", max_size=6), max_size=10),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4),
    include=st.booleans(),
)
def test_equals_naive_search(pieces: list[str], stops: list[str], include: bool) -> None:
    matcher = StopMatcher(stops, include)
    shown, matched, given_so_far = "", None, ""
    for piece in pieces:
        safe, matched = matcher.push(piece)
        given_so_far += piece
        shown += safe
        if matched is not None:
            break
        assert len(shown) == len(given_so_far) - longest_start(given_so_far, stops)
    if matched is None:
        shown += matcher.flush()
    assert (shown, matched) == naive("".join(pieces), stops, include)


@pytest.mark.parametrize(
    ("stops", "pieces", "text", "stop"),
    [
        (["</s>"], ["a<", "/s", "x</s>b"], "a</sx", "</s>"),
        (["\n\n", "\n"], ["a", "\n\n"], "a", "\n"),
        (["abcd", "bc"], ["xabcd"], "xa", "bc"),
        (["b", "ab"], ["ab"], "a", "b"),
        (["ab", "b"], ["ab"], "", "ab"),
        (["aab"], ["aa", "ab"], "a", "aab"),
        (["stop"], ["no ", "sto", "ne"], "no stone", None),
        (["é😀"], ["é", "😀"], "", "é😀"),
    ],
)
def test_examples(stops: list[str], pieces: list[str], text: str, stop: str | None) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        safe, found = matcher.push(piece)
        shown += safe
        if found is not None:
            break
    else:
        found = None
        shown += matcher.flush()
    assert (shown, found) == (text, stop)


def test_work_is_linear_in_the_text() -> None:
    """The worst case of a naive search: steps of the automaton are counted, not timed."""

    class Counting(StopMatcher):
        steps = 0

        def _step(self, state: int, char: str) -> int:
            Counting.steps += 1
            return super()._step(state, char)

    matcher = Counting(["a" * 1000 + "b"])
    built, Counting.steps = Counting.steps, 0
    for _ in range(200):
        matcher.push("a" * 100)
    assert Counting.steps <= 20_000
    assert built <= 1001
