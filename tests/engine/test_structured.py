"""Grammars in the engine: masks, ends, waiting for the compiler, and answers that obey under every kind of step."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structured_engine import EOS, VOCAB, VOCABULARY, answer, grammar_request, make_core

from octavo.api.structured import Grammars
from octavo.engine.structured.compiler import MAX_KEPT, Compiled, GrammarCompiler
from octavo.engine.structured.grammar import GrammarError, TokenGrammar
from octavo.engine.structured.vocabulary import Vocabulary
from octavo.errors import RequestError
from octavo.protocol.generate import SamplingParams, StructuredOutputsParams


def grammar_of(**fields: Any) -> str:
    return Grammars().grammar(StructuredOutputsParams(**fields))


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(lambda: VOCABULARY, VOCAB)


def start(compiler: GrammarCompiler, stop_ids: tuple[int, ...] = (EOS,), **fields: Any) -> TokenGrammar:
    return compiler.compile(grammar_of(**fields)).result(20).start(stop_ids)


def allowed(grammar: TokenGrammar) -> set[int]:
    mask = grammar.mask()
    assert len(mask) == 4 * ((VOCAB + 31) // 32)
    return {i for i in range(8 * len(mask)) if mask[i >> 3] >> (i & 7) & 1}


def feed(grammar: TokenGrammar, text: str) -> None:
    for byte in text.encode():
        assert byte in allowed(grammar)
        assert grammar.accept(byte)


def test_end_is_allowed_only_where_the_grammar_may_end(compiler: GrammarCompiler) -> None:
    grammar = start(compiler, regex="ab+")
    assert allowed(grammar) == {ord("a")}
    assert not grammar.accept(EOS) and not grammar.accept(ord("b"))
    feed(grammar, "ab")
    assert allowed(grammar) == {ord("b"), EOS} and not grammar.ended
    assert grammar.accept(EOS)
    grammar.rewind(1)
    assert allowed(grammar) == {ord("b"), EOS}


def test_nothing_can_follow(compiler: GrammarCompiler) -> None:
    grammar = start(compiler, choice=["yes", "no"])
    feed(grammar, "no")
    assert grammar.ended
    grammar.rewind(1)
    assert not grammar.ended and allowed(grammar) == {ord("o")}


def test_stop_tokens_that_are_text_and_ignore_eos(compiler: GrammarCompiler) -> None:
    grammar = start(compiler, stop_ids=(ord("x"),), regex="a[xy]*")  # ignore_eos, and x is a stop token
    assert allowed(grammar) == {ord("a")}
    feed(grammar, "a")
    assert allowed(grammar) == {ord("x"), ord("y")}  # x as the end; eos never
    grammar = start(
        compiler, stop_ids=(EOS, ord("}")), json={"type": "object", "additionalProperties": False}
    )
    feed(grammar, "{")
    with pytest.raises(GrammarError, match="no token"):  # the only way on is forbidden
        for _ in range(80):
            options = allowed(grammar)
            grammar.accept(min(options))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_rewind_restores_the_mask(compiler: GrammarCompiler, data: st.DataObject) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}}}
    grammar = start(compiler, json={**schema, "required": ["a"], "additionalProperties": False})
    for _ in range(data.draw(st.integers(0, 12))):
        if grammar.ended:
            return
        grammar.accept(data.draw(st.sampled_from(sorted(allowed(grammar) - {EOS} or {EOS}))))
    if grammar.ended:
        return
    before, count = grammar.mask(), 0
    for _ in range(data.draw(st.integers(0, 6))):
        options = sorted(allowed(grammar)) if not grammar.ended else []
        if options and grammar.accept(data.draw(st.sampled_from(options))):
            count += 1
        if count and grammar._stopped:
            break
    grammar.rewind(count)
    assert grammar.mask() == before


def test_digits_and_words_are_ascii(compiler: GrammarCompiler) -> None:
    assert allowed(start(compiler, regex=r"\d")) == set(range(ord("0"), ord("9") + 1))
    assert not allowed(start(compiler, regex=r"\w+")) - set(range(128))
    grammar = start(compiler, regex='a/b\n\\/"')
    feed(grammar, 'a/b\n/"')
    assert grammar.ended


def test_special_and_missing_tokens_are_never_text(compiler: GrammarCompiler) -> None:
    grammar = start(compiler, regex="(.|\n)*")
    assert allowed(grammar) == {*range(128), *range(0xC2, 0xF5), EOS}  # no bos, no padding rows


def test_broken_grammars_and_kept_ones() -> None:
    made = []

    def load() -> Vocabulary:
        made.append(threading.current_thread().name)
        return VOCABULARY

    compiler = GrammarCompiler(load, VOCAB)
    with pytest.raises(GrammarError, match="cannot be used"):
        compiler.compile("start: nothing").result(20)
    first = compiler.compile('start: "a"')
    assert compiler.compile('start: "a"') is first
    for i in range(MAX_KEPT):
        compiler.compile(f'start: "{i}"').result(20)
    assert compiler.compile('start: "a"') is not first
    assert len(made) == 1 and made[0].startswith("octavo-grammar")
    compiler.close()


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}


@given(
    overlap=st.booleans(),
    num_drafts=st.integers(0, 3),
    num_pages=st.integers(24, 60),
    budget=st.sampled_from([3, 17, 64]),
    kinds=st.lists(
        st.sampled_from(["json", "regex", "choice", "free", "eos", "min"]), min_size=1, max_size=6
    ),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_answers_obey_however_they_are_scheduled(
    overlap: bool, num_drafts: int, num_pages: int, budget: int, kinds: list[str], seed: int
) -> None:
    """Chunked prompts, preemption (few pages), overlap and drafts: the same obedient answer as alone."""
    core, runner = make_core(
        overlap=overlap, num_drafts=num_drafts, num_pages=num_pages, max_num_batched_tokens=budget
    )
    rules: dict[str, dict[str, Any]] = {
        "json": {"json": SCHEMA, "disable_any_whitespace": True},
        "regex": {"regex": "(ab|cd){2,5}"},
        "choice": {"choice": ["yes", "no", "maybe\n"]},
        "free": {},
        "eos": {"choice": ["yes"]},
        "min": {"regex": "x{3}"},
    }
    requests = []
    for i, kind in enumerate(kinds):
        limits: dict[str, dict[str, Any]] = {"eos": {"ignore_eos": True}, "min": {"min_tokens": 9}}
        more = limits.get(kind, {})
        rule = rules[kind]
        grammar = grammar_of(**rule) if rule else None
        requests.append(
            grammar_request(i, grammar, prompt_len=5 + 7 * i, seed=seed + i, max_tokens=70, **more)
        )
    answers = answer(core, requests)
    for i, kind in enumerate(kinds):
        text, reason = answers[i]
        if kind == "json":
            value = json.loads(text)
            assert reason == "stop" and set(value) == {"name", "size", "tags"} and 0 <= value["size"] <= 99
        elif kind == "regex":
            assert reason == "stop" and re.fullmatch("(ab|cd){2,5}", text)
        elif kind == "choice":
            assert reason == "stop" and text in ("yes", "no", "maybe\n")
        elif kind == "eos":
            assert (text, reason) == ("yes", "stop")
        elif kind == "min":
            assert (text, reason) == ("xxx", "stop")
    assert runner.violations == 0
    core.check()
    core.close()


def test_others_go_on_while_a_grammar_is_compiled() -> None:
    gate = threading.Event()

    def slow() -> Vocabulary:
        assert gate.wait(20)
        return VOCABULARY

    core, _ = make_core(load=slow)
    core.submit(grammar_request(1, grammar_of(choice=["yes"]), prompt_len=3))
    core.submit(grammar_request(2, None, prompt_len=3, max_tokens=4))
    core.submit(grammar_request(3, grammar_of(choice=["no"]), prompt_len=3))
    done = []
    for _ in range(12):
        done += [delta.id for delta in core.step() if delta.finish_reason]
    assert done == [2] and core.stats().num_waiting == 2
    core.abort([3])
    assert core.stats().num_waiting == 1
    gate.set()
    assert answer(core, []) == {1: ("yes", "stop")}
    core.close()


def test_a_grammar_that_never_gets_ready_ends_its_request_alone() -> None:
    gate = threading.Event()

    def slow() -> Vocabulary:
        gate.wait(20)
        return VOCABULARY

    core, _ = make_core(load=slow)
    assert core.lobby is not None
    core.lobby._max_wait_s = 0.0
    core.submit(grammar_request(1, grammar_of(choice=["yes"]), prompt_len=3))
    deltas = core.step()
    assert [(d.id, d.finish_reason) for d in deltas] == [(1, "error")] and "compiled" in (
        deltas[0].error or ""
    )
    assert not core.has_work
    gate.set()
    core.close()


def test_errors_end_one_sequence_only() -> None:
    core, _ = make_core()
    core.submit(grammar_request(1, "start: nothing", prompt_len=3))
    core.submit(grammar_request(2, grammar_of(choice=["ok"]), prompt_len=3))
    # Stop token "}" takes the only way out of the object.
    schema = {"type": "object", "additionalProperties": False}
    core.submit(
        grammar_request(
            3, grammar_of(json=schema, disable_any_whitespace=True), prompt_len=3, stop_token_ids=[ord("}")]
        )
    )
    errors = {}
    texts: dict[int, bytes] = {}
    while core.has_work:
        for delta in core.step():
            texts[delta.id] = texts.get(delta.id, b"") + bytes(delta.tokens)
            if delta.error:
                errors[delta.id] = delta.error
    assert set(errors) == {1, 3} and texts[2] == b"ok"
    assert "cannot be used" in errors[1] and "no token" in errors[3]
    core.check()
    core.close()


def test_requests_without_a_compiler_are_refused() -> None:
    core, _ = make_core(grammars=False)
    with pytest.raises(RequestError, match="no grammars"):
        core.submit(grammar_request(1, 'start: "a"', prompt_len=3))
    request = grammar_request(1, None, prompt_len=3)
    request.sampling = SamplingParams(structured_outputs=StructuredOutputsParams(json_object=True))
    with pytest.raises(RequestError, match="front half"):
        core.submit(request)


def test_the_runner_would_misbehave_without_masks() -> None:
    core, _ = make_core()
    texts = answer(core, [grammar_request(1, None, prompt_len=3, max_tokens=30)])
    assert not re.fullmatch("(ab|cd){2,5}", texts[1][0])


def test_an_end_token_that_is_text_cannot_stand_inside_a_string() -> None:
    """Some tokenizers do not mark their end token as special; it ends an answer all the same."""
    plain = dataclasses.replace(VOCABULARY, special_ids=frozenset())
    compiler = GrammarCompiler(lambda: plain, VOCAB)
    text = Grammars().grammar(StructuredOutputsParams(json={"type": "string"}))
    grammar = compiler.compile(text).result(30).start([EOS])
    for token, ends in ((ord('"'), False), (ord("a"), False), (ord('"'), True)):
        assert grammar.accept(token)
        assert bool(grammar.mask()[EOS >> 3] >> (EOS & 7) & 1) is ends
    compiler.close()


@pytest.mark.parametrize("at_once", [True, False])
def test_a_panic_ends_one_grammar(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Rust library's panic is no ``Exception``; the engine's loop must not see it as it is."""

    class PanicException(BaseException):
        pass

    def panics(self: GrammarCompiler, grammar: str) -> Compiled:
        raise PanicException("byte index 3 is not a char boundary")

    monkeypatch.setattr(GrammarCompiler, "_compile", panics)
    compiler = GrammarCompiler(lambda: Vocabulary([], frozenset(), (), lambda text: []), 8, at_once=at_once)
    with pytest.raises(GrammarError, match="char boundary"):
        compiler.compile("start: /a/").result()
    compiler.close()
