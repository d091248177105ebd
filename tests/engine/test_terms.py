"""Deadlines, shared prompts, token rules: what a request may ask of the engine beside sampling."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from engines import VOCAB, null_core
from structured_engine import EOS, make_core

from octavo.engine.core import EngineCore
from octavo.engine.structured.grammar import GrammarError
from octavo.engine.structured.rules import TokenRules
from octavo.errors import QueueFullError, RequestError
from octavo.protocol.generate import GenerateRequest, SamplingParams, Terms, TokenDelta


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def clocked(core: EngineCore) -> Clock:
    clock = Clock()
    core._clock = clock
    return clock


def make(id: int, *, prompt: int = 6, terms: Terms | None = None, **fields: Any) -> GenerateRequest:
    leader, bad_words = fields.pop("leader", None), fields.pop("bad_words", [])
    return GenerateRequest(
        id=id,
        prompt_token_ids=[(i * 7) % 250 for i in range(prompt)],
        sampling=SamplingParams(**{"max_tokens": 8, "seed": id, **fields}),
        eos_token_ids=[EOS],
        terms=terms or Terms(),
        leader=leader,
        bad_words=bad_words,
    )


def finish(core: EngineCore, until: Callable[[], bool] = lambda: False) -> list[TokenDelta]:
    deltas: list[TokenDelta] = []
    while core.has_work and not until():
        deltas += core.step()
        core.check()
    return deltas


@pytest.mark.parametrize("overlap", [False, True])
def test_a_deadline_ends_an_answer_where_it_is(overlap: bool) -> None:
    core = null_core(overlap=overlap)
    clock = clocked(core)
    core.submit(make(1, terms=Terms(deadline_ms=50), max_tokens=100))
    core.submit(make(2, max_tokens=10))
    deltas = []
    for _ in range(8):
        deltas += core.step()
        clock.now += 0.010
    mine = [delta for delta in deltas + finish(core) if delta.id == 1]
    assert mine[-1].finish_reason == "deadline" and mine[-1].error is None
    assert 3 <= sum(len(delta.tokens) for delta in mine) <= 6
    assert core.stats().num_deadlines == 1 and core.stats().num_running == 0


def test_waiting_too_long_is_a_rejection_that_names_the_time() -> None:
    core = null_core(num_slots=1)
    clock = clocked(core)
    core.submit(make(1, max_tokens=100))
    core.step()
    core.submit(make(2, terms=Terms(max_queue_ms=20)))
    core.submit(make(3, terms=Terms(deadline_ms=20)))
    core.submit(make(4, terms=Terms(max_queue_ms=20_000)))
    core.step()
    clock.now += 0.021
    ended = [delta for delta in core.step() if delta.id in (2, 3)]
    assert [delta.finish_reason for delta in ended] == ["rejected", "rejected"]
    assert "0.02 s" in (ended[0].error or "")
    assert core.stats().num_rejected == 2 and core.num_waiting == 1
    assert {delta.id for delta in finish(core)} == {1, 4}


def test_what_has_begun_is_not_rejected() -> None:
    core = null_core()
    clock = clocked(core)
    core.submit(make(1, terms=Terms(max_queue_ms=1)))
    core.step()
    clock.now += 1
    assert finish(core)[-1].finish_reason == "length"


def test_times_tell_waiting_from_computing() -> None:
    core = null_core(num_slots=1, max_num_batched_tokens=4)
    clock = clocked(core)
    core.submit(make(1, prompt=1, max_tokens=1))
    core.submit(make(2, prompt=12))
    found: dict[int, TokenDelta] = {}
    for _ in range(12):
        clock.now += 0.25
        for delta in core.step():
            found.setdefault(delta.id, delta)
    assert found[1].times is not None and found[1].times.queue_s == 0.25 and found[1].times.prefill_s == 0
    assert found[2].times is not None and found[2].times.queue_s == 0.5 and found[2].times.prefill_s == 0.5


@pytest.mark.parametrize("prompt", [100, 64, 33])
@pytest.mark.parametrize("overlap", [False, True])
def test_choices_share_one_computation_of_the_prompt(prompt: int, overlap: bool) -> None:
    core = null_core(overlap=overlap, num_pages=256, num_slots=16, max_num_batched_tokens=48)
    for id in range(1, 9):
        core.submit(make(id, prompt=prompt, leader=None if id == 1 else 1))
    deltas = finish(core)
    computed = core.stats().num_step_tokens
    whole_pages = (prompt - 1) // 16 * 16
    assert computed <= prompt + 7 * (prompt - whole_pages) + 8 * 7 + (8 if overlap else 0)
    alone = null_core(num_pages=256, num_slots=16)
    for id in range(1, 9):
        alone.submit(make(id, prompt=prompt))
    answers = [
        {i: [t for d in some if d.id == i for t in d.tokens] for i in range(1, 9)}
        for some in (deltas, finish(alone))
    ]
    assert answers[0] == answers[1]


def test_followers_go_on_when_the_leader_ends_early() -> None:
    core = null_core(max_num_batched_tokens=4)
    for id in (1, 2, 3):
        core.submit(make(id, prompt=40, leader=None if id == 1 else 1))
    core.step()
    assert core.stats().num_deferred == 2
    core.abort([2])
    core.abort([1])
    assert core.stats().num_deferred == 0
    assert [d.id for d in finish(core) if d.finish_reason] == [3]


def test_no_waiting_where_nothing_can_be_shared() -> None:
    core = null_core(enable_prefix_caching=False)
    core.submit(make(1, prompt=40))
    core.submit(make(2, prompt=40, leader=1))
    assert core.stats().num_deferred == 0


@pytest.mark.parametrize("num_drafts", [0, 3])
@pytest.mark.parametrize("overlap", [False, True])
def test_only_allowed_tokens_are_drawn(num_drafts: int, overlap: bool) -> None:
    core, _ = make_core(num_drafts=num_drafts, overlap=overlap)
    allowed = [3, 77, 200]
    core.submit(make(1, allowed_token_ids=allowed, max_tokens=30))
    tokens = [token for delta in finish(core) for token in delta.tokens]
    assert len(tokens) == 30 and set(tokens) <= set(allowed) and len(set(tokens)) > 1


@pytest.mark.parametrize("num_drafts", [0, 3])
@pytest.mark.parametrize("overlap", [False, True])
def test_bad_words_never_appear(num_drafts: int, overlap: bool) -> None:
    core, _ = make_core(num_drafts=num_drafts, overlap=overlap)
    bad = [[5], [90, 180, 90], [180, 180, 180]]
    core.submit(make(1, allowed_token_ids=[5, 90, 180], bad_words=bad, max_tokens=60))
    tokens = [token for delta in finish(core) for token in delta.tokens]
    assert len(tokens) == 60 and {90, 180} == set(tokens)
    assert not any(tokens[i : i + len(word)] == word for word in bad for i in range(len(tokens)))


def test_rules_with_a_grammar() -> None:
    core, _ = make_core()
    wanted = make(1, allowed_token_ids=[ord("a"), ord("b"), EOS], max_tokens=40)
    wanted.grammar = "start: /[a-z]{3,9}/"
    core.submit(wanted)
    tokens = [token for delta in finish(core) for token in delta.tokens]
    assert 3 <= len([t for t in tokens if t != EOS]) <= 9 and set(tokens) <= {ord("a"), ord("b"), EOS}


def test_rules_that_leave_nothing_end_only_their_request() -> None:
    core, _ = make_core()
    wrong = make(1, allowed_token_ids=[ord("1"), EOS])
    wrong.grammar = "start: /[a-z]{3,9}/"
    core.submit(wrong)
    core.submit(make(2))
    deltas = finish(core)
    assert next(d for d in deltas if d.id == 1).finish_reason == "unsatisfiable"
    assert "No token is left" in (next(d for d in deltas if d.id == 1).error or "")
    assert any(d.id == 2 and d.finish_reason == "length" for d in deltas)


def test_rules_equal_a_plain_model() -> None:
    """Random walks with rewinds against the definition."""
    rng = random.Random(3)
    for _ in range(200):
        vocab = rng.choice([8, 33, 64])
        words = [[rng.randrange(vocab) for _ in range(rng.randint(1, 3))] for _ in range(rng.randint(0, 6))]
        allowed = rng.sample(range(vocab), rng.randint(1, vocab)) if rng.random() < 0.5 else None
        rules, tokens = TokenRules(allowed, words, None, vocab_size=vocab), []
        for _ in range(40):
            left = {
                t
                for t in (range(vocab) if allowed is None else allowed)
                if not any([*tokens, t][-len(w) :] == w for w in words)
            }
            if not left:
                with pytest.raises(GrammarError):
                    rules.mask()
                break
            mask = rules.mask()
            assert {t for t in range(8 * len(mask)) if mask[t >> 3] >> (t & 7) & 1} == left
            token = rng.randrange(vocab)
            assert rules.accept(token) == (token in left)
            if token in left:
                tokens.append(token)
            if tokens and rng.random() < 0.2:
                count = rng.randint(1, len(tokens))
                rules.rewind(count)
                del tokens[-count:]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": [VOCAB]}, "allowed_token_ids"),
        ({"allowed_token_ids": [EOS], "min_tokens": 2}, "allowed_token_ids"),
        ({"bad_words": [[1, VOCAB]]}, "bad_words"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        null_core().submit(make(1, **fields))
    assert caught.value.param == param


def test_a_full_queue_counts_as_a_rejection() -> None:
    core = null_core(num_slots=1, max_queue_len=1)
    core.submit(make(1))
    core.submit(make(2))
    with pytest.raises(QueueFullError):
        core.submit(make(3))
    assert core.stats().num_rejected == 1
    finish(core)
