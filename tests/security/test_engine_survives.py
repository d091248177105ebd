"""Advisories about the engine and its text: grammars, parsers, drafts, the prefix cache, the socket between the halves."""

from __future__ import annotations

import asyncio
import os
import random
import stat
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structured_engine
from engines import VOCAB as NULL_VOCAB
from engines import null_core, request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_fake import FakeEngine, for_ever, make_app, make_client, make_tokenizer, says
from starlette.testclient import TestClient
from structured_engine import EOS, VOCAB, VOCABULARY, MaskedRunner, grammar_request, make_core
from walk import CHAT, GENERATES

from octavo.api.chat.formats import families
from octavo.api.chat.formats.tools import ToolParser, ToolSyntax
from octavo.api.server.local import call
from octavo.api.structured import make_grammar
from octavo.api.text.detokenizer import Detokenizer
from octavo.api.text.stop_strings import StopMatcher
from octavo.engine.client import messages
from octavo.engine.client.channel import Channel
from octavo.engine.structured.compiler import MAX_KEPT, GrammarCompiler
from octavo.engine.structured.grammar import GrammarError
from octavo.engine.structured.rules import TokenRules
from octavo.errors import RequestError
from octavo.protocol.generate import GenerateRequest, SamplingParams, StructuredOutputsParams
from octavo.protocol.plan import GrammarMask

SYNTAXES = [value for value in vars(families).values() if isinstance(value, ToolSyntax)]


def test_05_cve_2025_30165_the_socket_is_private_and_speaks_types(record_property: Any) -> None:
    """Unix sockets in a folder of our own, and frames of declared types: damage is an error, never code."""
    channel = Channel([sys.executable, "-c", "pass"])
    try:
        folder = Path(channel.folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and folder.stat().st_uid == os.getuid()
    finally:
        channel.stop(20)
    assert not folder.exists()
    decode = msgspec.msgpack.Decoder(messages.ToEngine).decode
    whole = msgspec.msgpack.encode(
        messages.Submit(GenerateRequest(id=1, prompt_token_ids=[1], sampling=SamplingParams()))
    )
    rng, tried = random.Random(5), 3000
    for _ in range(tried):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 5)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            assert isinstance(decode(damaged[: rng.randint(1, len(damaged))]), messages.ToEngine)
        except (msgspec.MsgspecError, RequestError, UnicodeDecodeError):
            continue
    record_property("inputs", tried)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
KEYWORDS = [
    *(
        "type",
        "properties",
        "items",
        "enum",
        "const",
        "pattern",
        "format",
        "minLength",
        "maxLength",
        "minimum",
    ),
    *("maximum", "anyOf", "allOf", "oneOf", "not", "$ref", "$defs", "required", "additionalProperties", "if"),
    *("patternProperties", "prefixItems", "multipleOf", "x-guidance", "definitions", "$id", "title"),
]
schemas = st.dictionaries(st.sampled_from(KEYWORDS), json_values, max_size=4)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    schema=schemas,
    field=st.sampled_from(["json", "response_format", "tool", "regex", "grammar"]),
    text=st.text(max_size=20),
)
def _fuzz_schemas(client: TestClient, schema: dict[str, Any], field: str, text: str) -> None:
    body: dict[str, Any] = dict(CHAT)
    if field == "tool":
        function = {"name": "f", "parameters": schema, "strict": True}
        body |= {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    elif field == "response_format":
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    else:
        body["structured_outputs"] = {field: schema if field == "json" else text}
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code in (200, 400), (body, reply.text)
    assert "0x" not in reply.text


def test_25_cve_2025_48942_random_schemas_and_expressions(record_property: Any) -> None:
    client = make_client(FakeEngine(rule=says("ab")))
    _fuzz_schemas(client)
    record_property("inputs", 400)
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_25_cve_2025_48942_a_panic_of_the_checker_is_a_bad_request() -> None:
    """llguidance cuts its own message at a byte, in the middle of a character, and panics: no ``Exception``."""
    client = make_client(FakeEngine(rule=says("ab")))
    answers = []
    for length in range(80, 90):
        schema = {"type": "object", "required": {"a" * length + "\u00b8" * 20: 1}}
        body = {**CHAT, "structured_outputs": {"json": schema}}
        answers.append(client.post("/v1/chat/completions", json=body))
    assert {answer.status_code for answer in answers} == {400}
    assert any("cannot be read" in answer.text for answer in answers)
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


CODE = [
    "__import__('os').system('touch {canary}')",
    "{{'a': __import__('os').system('touch {canary}')}}",
    "open('{canary}', 'w')",
    "[x for x in ().__class__.__base__.__subclasses__()]",
    "f(a=open('{canary}','w'))",
]


def test_25b_cve_2025_9141_calls_are_read_and_never_run(tmp_path: Path, record_property: Any) -> None:
    canary, tried = tmp_path / "canary", 0
    rng = random.Random(2)
    for syntax in SYNTAXES:
        for code in CODE:
            code = code.format(canary=canary)
            for text in (
                code,
                f'<tool_call>\n{{"name": "f", "arguments": {code}}}\n</tool_call>',
                f'[TOOL_CALLS][{{"name": "f", "arguments": {code}}}]',
                f'{{"name": "f", "parameters": {code}}}',
                f"<function=f>\n<parameter=a>\n{code}\n</parameter>\n</function>",
                f"[{code}]",
            ):
                parser = ToolParser(syntax, 0, names=["f"])
                at = 0
                while at < len(text):
                    size = rng.randint(1, 9)
                    parser.push(text[at : at + size])
                    at += size
                parser.finish()
                tried += 1
    assert not canary.exists() and len(SYNTAXES) >= 5
    record_property("inputs", tried)


PATHOLOGICAL = [
    *(
        "(a+)+b",
        "((a*)*)*",
        "(a|a)*b",
        "(a{0,999}){0,999}",
        "(x+x+)+y",
        "(.*){50}",
        "(.|\\n){1,60000}",
        "[^a]{5000}" * 9,
    ),
    *(
        "(a|b|ab)*c",
        "((((((((a{9}){9}){9}){9}){9}){9}){9}){9})",
        "(" * 2000 + "a" + ")" * 2000,
        "a" * 100_000,
        "a|" * 50_000,
    ),
    *("(?i)" + "ab" * 20_000, "\\p{L}{1,2000}", "(a?){3000}a{3000}", "(.{1,500}x){1,100}"),
]


@pytest.mark.parametrize("index", range(len(PATHOLOGICAL)))
def test_26_cve_2026_55574_expressions_take_at_most_a_second(index: int) -> None:
    """Front half and compilation together, in CPU time, the best of three: other load on the machine must not decide."""
    spent = min(seconds_of(PATHOLOGICAL[index]) for _ in range(3))
    assert spent < 1.0, f"{spent:.2f} s of CPU"


def seconds_of(expression: str) -> float:
    """The CPU time of a grammar of ``expression`` and of its first tokens."""
    params = StructuredOutputsParams(regex=expression)
    compiler = GrammarCompiler(lambda: VOCABULARY, VOCAB)
    compiler.compile('start: "x"').result(60)  # tables of the vocabulary, once a model
    began = time.process_time()
    try:
        compiled = compiler.compile(make_grammar(params, "p")).result(60)
        grammar = compiled.start([EOS])
        for _ in range(20):
            mask = grammar.mask()
            token = next(t for t in range(VOCAB) if mask[t >> 3] >> (t & 7) & 1)
            if not grammar.accept(token) or grammar.ended:
                break
    except (RequestError, GrammarError):
        pass
    finally:
        spent = time.process_time() - began
        compiler.close()
    return spent


def test_26_other_streams_go_on_while_a_grammar_is_checked() -> None:
    """Large grammars are checked beside the event loop, so that the loop serves others meanwhile."""
    engine = FakeEngine(rule=for_ever, max_model_len=100_000)
    app = make_app(engine)
    expression = "|".join(f"{word:x}{'a' * (word % 50)}" for word in range(6000))

    async def go() -> int:
        stream = b'{"prompt": "x", "max_tokens": 90000, "ignore_eos": true}'
        other = asyncio.create_task(call(app, "POST", "/v1/completions", stream))
        while engine.stats.num_generation_tokens < 10:
            await asyncio.sleep(0)
        before = engine.stats.num_generation_tokens
        body = msgspec.json.encode(
            {"prompt": "y", "max_tokens": 1, "structured_outputs": {"regex": expression}}
        )
        await call(app, "POST", "/v1/completions", body)
        meanwhile = engine.stats.num_generation_tokens - before
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)
        return meanwhile

    assert asyncio.run(go()) > 50


def cpu_s(work: Any) -> float:
    """CPU seconds of the best of three."""
    times = []
    for _ in range(3):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


HOSTILE = [
    *(
        "<tool_call>",
        "<tool_call",
        "{",
        '{"name": "',
        '{"name": "f", "arguments": {',
        "[",
        "\\",
        '"',
        "<",
        "\n",
        "</think>",
    ),
    *("[TOOL_CALLS]", "<function=", "<parameter=a>", "a", '{"a":', "é", "<|python_tag|>"),
]


def test_27_cve_2025_48887_parsers_are_linear(record_property: Any) -> None:
    """Four times the text takes about four times as long, for every format and every hostile piece."""

    def read(syntax: ToolSyntax, text: str) -> None:
        parser = ToolParser(syntax, 0, names=["f"])
        for at in range(0, len(text), 64):
            parser.push(text[at : at + 64])
        parser.finish()

    tried = 0
    for syntax in SYNTAXES:
        for piece in HOSTILE:
            texts = [(piece * size)[:size] for size in (4096, 16_384)]
            short, long = (cpu_s(partial(read, syntax, text)) for text in texts)
            assert long < 10 * short + 0.05, (syntax, piece, short, long)
            tried += 1
    record_property("inputs", tried)


def test_27_cve_2025_46560_a_megabyte_of_text_is_quick() -> None:
    text = "ab" * 500_000
    matcher = StopMatcher([("ab" * 500) + "c", "b" * 1000, "a" * 1000])
    assert cpu_s(lambda: [matcher.push(text[at : at + 4096]) for at in range(0, len(text), 4096)]) < 5
    client = make_client(FakeEngine(rule=says("ab"), max_model_len=2_000_000))
    began = time.process_time()
    assert (
        client.post("/v1/completions", json={"prompt": "<|image|>" * 100_000, "max_tokens": 1}).status_code
        == 200
    )
    assert time.process_time() - began < 10


BAD_DRAFTS = [-1, VOCAB, VOCAB + 7, 2**31 - 1, 2**31, 2**40, -(2**40), EOS + 1]


@pytest.mark.parametrize("rules", [False, True])
@pytest.mark.parametrize("grammar", ["start: /[a-z]{3,30}/", None])
def test_29_cve_2026_54234_drafts_may_be_anything(
    grammar: str | None, rules: bool, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    """A drafter that offers ids outside the vocabulary: the answer is the one without drafts."""
    rng, tried = random.Random(7), 0

    class Liar(MaskedRunner):
        def sample(self, masks: list[GrammarMask]) -> None:
            nonlocal tried
            super().sample(masks)
            result = self._ready[-1]
            for drafts in result.draft_tokens or []:
                for place in range(len(drafts)):
                    if rng.random() < 0.5:
                        drafts[place] = rng.choice(BAD_DRAFTS)
                        tried += 1

    monkeypatch.setattr(structured_engine, "MaskedRunner", Liar)
    answers = []
    for num_drafts in (0, 3):
        core, _ = make_core(num_drafts=num_drafts)
        wanted = [grammar_request(id, grammar, prompt_len=5, seed=id) for id in range(1, 5)]
        if rules:
            wanted = [
                grammar_request(id, grammar, prompt_len=5, seed=id, allowed_token_ids=[*range(97, 123), EOS])
                for id in range(1, 5)
            ]
        for one in wanted:
            core.submit(one)
        found: dict[int, list[int]] = {}
        while core.has_work:
            for delta in core.step():
                assert delta.error is None
                found.setdefault(delta.id, []).extend(delta.tokens)
            core.check()
        answers.append(found)
    assert tried > 0 or (grammar is None and not rules)
    if grammar is not None or rules:
        assert answers[0] == answers[1]
    record_property("inputs", tried)


def test_29_constraints_refuse_ids_that_do_not_exist() -> None:
    compiler = GrammarCompiler(lambda: VOCABULARY, VOCAB)
    grammar = compiler.compile("start: /[a-z]+/").result(60).start([EOS])
    rules = TokenRules([97], [[97, 98]], None, vocab_size=VOCAB)
    for bad in BAD_DRAFTS:
        for constraint in (grammar, rules):
            before = constraint.mask()
            assert not constraint.accept(bad)
            assert constraint.mask() == before
    compiler.close()


def test_30_the_engine_checks_ids_itself() -> None:
    core = null_core()
    for bad in (-1, NULL_VOCAB, 2**31):
        with pytest.raises(RequestError):
            core.submit(GenerateRequest(id=1, prompt_token_ids=[1, bad], sampling=SamplingParams()))
    assert not core.has_work


def test_32_cve_2025_25183_prefix_hashes_cannot_be_guessed() -> None:
    """Keyed with a random root: two engines never agree, one engine always does, and salts separate."""
    tokens = list(range(64))
    digests = set()
    for _ in range(5):
        index = null_core().pages.index
        assert index.chain(tokens, None).upto(64) == index.chain(tokens, None).upto(64)
        for salt in (None, "", "a", "b"):
            digests.add(index.chain(tokens, salt).upto(64))
    assert len(digests) >= 5 * 3 and min(map(len, digests)) >= 16


def test_32_cve_2025_46722_lists_of_tokens_are_hashed_as_lists() -> None:
    """Tokens that read the same as digits or bytes one after the other are different prefixes."""
    index = null_core().pages.index
    chains = [
        [1, 23] * 8,
        [12, 3] * 8,
        [123] * 16,
        [1, 2, 3, 0] * 4,
        [256, 0] * 8,
        [0, 256] * 8,
        [1 << 16, 1] * 8,
    ]
    assert len({index.chain(tokens, None).upto(16) for tokens in chains}) == len(chains)


def test_33_cve_2025_46570_another_salt_computes_everything() -> None:
    core = null_core()

    def computed(salt: str | None) -> int:
        before = core.stats().num_step_tokens
        wanted = request(core.stats().num_steps + 1000, list(range(48)), max_tokens=1)
        wanted.cache_salt = salt
        core.submit(wanted)
        while core.has_work:
            core.step()
        return core.stats().num_step_tokens - before

    assert computed("one") == 48
    assert computed("one") < 48 == computed("two") == computed(None)


def test_34_cve_2025_29770_compiled_grammars_are_bounded() -> None:
    compiler = GrammarCompiler(lambda: VOCABULARY, VOCAB)
    for number in range(3 * MAX_KEPT):
        compiler.compile(f'start: "{number}"').result(60)
    assert len(compiler._kept) == MAX_KEPT
    compiler.close()


def test_27_the_detokenizer_is_linear() -> None:
    def read(count: int) -> None:
        detokenizer = Detokenizer(make_tokenizer(), True, [])
        for _ in range(count):
            detokenizer.push([0xC3])  # never a whole character

    short, long = cpu_s(lambda: read(4000)), cpu_s(lambda: read(16_000))
    assert long < 10 * short + 0.05, (short, long)


@pytest.mark.parametrize("path", GENERATES)
def test_25_the_engine_outlives_every_grammar_of_the_corpus(path: str) -> None:
    client = make_client(FakeEngine(rule=says("ab")))
    for expression in (
        "(",
        "[",
        "*",
        "(?=a)",
        "\\1",
        "a{2,1}",
        "a{99999}",
        "\x00",
        "\ud83d",
        "(?P<x>a)",
        "[z-a]",
        "\\",
    ):
        body = {"prompt": "x"} if "chat" not in path else dict(CHAT)
        raw = msgspec.json.encode(
            {**body, "structured_outputs": {"regex": expression.encode("utf-8", "replace").decode()}}
        )
        reply = client.post(path, content=raw, headers={"content-type": "application/json"})
        assert reply.status_code in (200, 400)
