"""Thinking budgets in the engine: exact, the same under every kind of step, and composed with grammars."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structured_engine import EOS, VOCAB, grammar_request, make_core

from octavo.engine.core import EngineCore
from octavo.engine.structured.thinking import ThinkingConstraint
from octavo.errors import RequestError
from octavo.protocol.generate import GenerateRequest, Thinking

THINK, END = 258, 259
REGEX = "(ab|cd){2,5}"
GRAMMAR = f"start: /{REGEX}/"


def request(
    id: int, *, grammar: bool, budget: int, opened: int | None, max_tokens: int = 60, **more: Any
) -> GenerateRequest:
    made = grammar_request(
        id, GRAMMAR if grammar else None, prompt_len=4 + 9 * id, seed=31 + id, max_tokens=max_tokens, **more
    )
    made.thinking = Thinking(start_id=THINK, end_id=END, budget=budget, num_prompt_tokens=opened)
    return made


def run(core: EngineCore, requests: list[GenerateRequest]) -> dict[int, list[int]]:
    for made in requests:
        core.submit(made)
    tokens: dict[int, list[int]] = {made.id: [] for made in requests}
    for _ in range(20_000):
        if not core.has_work:
            break
        for delta in core.step():
            assert delta.error is None, delta.error
            tokens[delta.id] += delta.tokens
    core.check()
    core.close()
    return tokens


kinds = st.lists(
    st.tuples(st.booleans(), st.sampled_from([-1, 0, 1, 2, 7]), st.sampled_from([None, 0, 1, 5, 20])),
    min_size=1,
    max_size=5,
)


@given(
    kinds=kinds,
    overlap=st.booleans(),
    num_drafts=st.integers(0, 3),
    num_pages=st.integers(30, 60),
    step_tokens=st.sampled_from([3, 64]),
)
@settings(max_examples=80, deadline=None)
def test_budgets_are_exact_however_they_are_scheduled(
    kinds: list[tuple[bool, int, int | None]],
    overlap: bool,
    num_drafts: int,
    num_pages: int,
    step_tokens: int,
) -> None:
    def requests() -> list[GenerateRequest]:
        return [request(i, grammar=g, budget=b, opened=o) for i, (g, b, o) in enumerate(kinds)]

    core, _ = make_core(
        overlap=overlap, num_drafts=num_drafts, num_pages=num_pages, max_num_batched_tokens=step_tokens
    )
    answers = run(core, requests())
    assert answers == run(make_core()[0], requests())
    for i, (grammar, budget, opened) in enumerate(kinds):
        tokens = answers[i]
        inside = opened is not None
        if not inside and THINK in tokens:
            tokens, inside = tokens[tokens.index(THINK) + 1 :], True
        if inside and budget >= 0:
            left = max(0, budget - (opened or 0))
            thoughts = tokens[: tokens.index(END)] if END in tokens else tokens
            assert len(thoughts) <= left
            assert END in tokens or tokens[-1:] == [EOS]
        if grammar and (END in tokens or not inside):
            text = bytes(t for t in tokens[tokens.index(END) + 1 if inside else 0 :] if t < 256).decode()
            assert re.fullmatch(REGEX, text), text
        if grammar and inside:
            assert EOS not in tokens[: tokens.index(END) if END in tokens else None]


def test_budget_zero_ends_thoughts_at_once() -> None:
    assert run(make_core()[0], [request(1, grammar=False, budget=0, opened=0, max_tokens=3)])[1][0] == END
    assert run(make_core()[0], [request(1, grammar=False, budget=3, opened=9, max_tokens=3)])[1][0] == END
    free = run(make_core()[0], [request(1, grammar=False, budget=-1, opened=9, max_tokens=30)])[1]
    assert END not in free and len(free) == 30


class Any_:
    """A constraint that allows everything and counts."""

    ended = False

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def accept(self, token: int) -> bool:
        self.tokens.append(token)
        return True

    def rewind(self, count: int) -> None:
        if count:
            del self.tokens[-count:]

    def mask(self) -> bytes:
        return b"\xff" * 36


@given(tokens=st.lists(st.sampled_from([1, 2, THINK, END, EOS]), max_size=12), back=st.integers(0, 12))
@settings(max_examples=200, deadline=None)
def test_rewind_restores_everything(tokens: list[int], back: int) -> None:
    inner = Any_()
    made = ThinkingConstraint(
        Thinking(start_id=THINK, end_id=END, budget=2), inner, vocab_size=VOCAB, stop_ids=[EOS]
    )
    states = [(made.mask(), list(inner.tokens))]
    for token in tokens:
        allowed = made.mask()[token >> 3] >> (token & 7) & 1
        assert made.accept(token) == bool(allowed)
        if allowed:
            states.append((made.mask(), list(inner.tokens)))
    back = min(back, len(states) - 1)
    made.rewind(back)
    assert (made.mask(), inner.tokens) == states[len(states) - 1 - back]


def test_markers_outside_the_vocabulary_are_refused() -> None:
    core, _ = make_core()
    made = request(1, grammar=False, budget=1, opened=None)
    made.thinking = Thinking(start_id=VOCAB, end_id=END)
    with pytest.raises(RequestError, match="thinking"):
        core.submit(made)
