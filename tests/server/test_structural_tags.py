"""Structural tags: free text that cannot leave its segments unfinished, in both forms, through to the reply."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from llguidance import LLMatcher
from server_fake import FakeEngine, make_client, make_tokenizer, says

from octavo.api.structured import Grammars
from octavo.engine.structured.compiler import GrammarCompiler
from octavo.engine.structured.vocabulary import Vocabulary
from octavo.errors import RequestError
from octavo.protocol.generate import StructuredOutputsParams

VOCAB = 300
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}},
    "required": ["city"],
    "additionalProperties": False,
}
NUMBER = {"type": "integer", "minimum": 0, "maximum": 99}
LEGACY: dict[str, Any] = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<fn=get>", "schema": CITY, "end": "</fn>"},
        {"begin": "<fn=num>", "schema": NUMBER, "end": "</fn>"},
    ],
    "triggers": ["<fn="],
}
MODERN: dict[str, Any] = {
    "type": "structural_tag",
    "format": {
        "type": "triggered_tags",
        "triggers": ["<fn="],
        "tags": [
            {
                "type": "tag",
                "begin": s["begin"],
                "content": {"type": "json_schema", "json_schema": s["schema"]},
                "end": s["end"],
            }
            for s in LEGACY["structures"]
        ],
    },
}


def matcher(tag: Any, **more: Any) -> LLMatcher:
    tokenizer = make_tokenizer()
    vocabulary = Vocabulary(
        tokens=[tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)],
        special_ids=tokenizer.special_ids,
        eos_token_ids=tuple(tokenizer.eos_token_ids),
        encode=lambda text: list(text.encode()),
    )
    compiler = GrammarCompiler(lambda: vocabulary, VOCAB)
    grammar = Grammars().grammar(StructuredOutputsParams(structural_tag=tag, **more))
    try:
        return compiler.compile(grammar).result(30).matcher.deep_copy()
    finally:
        compiler.close()


def accepts(tag: Any, text: str, *, whole: bool = True, **more: Any) -> bool:
    found = matcher(tag, **more)
    data = list(text.encode())
    return found.try_consume_tokens(data) == len(data) and (not whole or found.is_accepting())


@pytest.mark.parametrize("tag", [LEGACY, MODERN, json.dumps(LEGACY), json.dumps(MODERN)], ids=range(4))
def test_text_is_free_and_segments_are_not(tag: Any) -> None:
    for text in (
        "",
        "any text, < and <fn too",
        'before <fn=get>{"city":"Rome"}</fn> after',
        "<fn=num>7</fn><fn=num>42</fn>",
        'x<fn=num>7</fn>y<fn=get>{"city": "Oslo"}</fn>',
    ):
        assert accepts(tag, text), text
    for text in (
        "<fn=other>",
        "<fn=get>Rome",
        '<fn=get>{"town"',
        "<fn=num>100",
        'a <fn=get>{"city":"Roma Aeterna"',
        "<fn=num>7</fn><fn=x",
    ):
        assert not accepts(tag, text, whole=False), text
    assert not accepts(tag, "<fn=num>7")  # open segments cannot be the end
    assert not accepts(tag, "<fn=")


def test_at_least_one_and_stop_after_first() -> None:
    form = {**MODERN, "format": {**MODERN["format"], "at_least_one": True}}
    assert not accepts(form, "no segment") and accepts(form, "a<fn=num>1</fn>b")
    form = {**MODERN, "format": {**MODERN["format"], "stop_after_first": True}}
    assert accepts(form, "no segment") and accepts(form, "a<fn=num>1</fn>")
    assert not accepts(form, "a<fn=num>1</fn>b", whole=False)


def test_one_tag_and_a_bare_schema() -> None:
    tag = {"type": "structural_tag", "format": MODERN["format"]["tags"][1]}
    assert accepts(tag, "<fn=num>5</fn>") and not accepts(tag, "x", whole=False)
    bare = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": NUMBER}}
    assert accepts(bare, "12") and not accepts(bare, "x", whole=False)


def test_options_of_json_hold_inside() -> None:
    assert accepts(LEGACY, '<fn=get>{ "city": "a" }</fn>')
    assert not accepts(LEGACY, "<fn=get>{ ", whole=False, disable_any_whitespace=True)


def test_random_walks_never_leave_a_segment_broken() -> None:
    rng, segments = random.Random(4), 0
    for walk in range(60):
        found, data = matcher(MODERN), bytearray()
        script = f"text {walk} <fn=" if walk % 2 else ""
        assert found.try_consume_tokens(list(script.encode())) == len(script)
        data += script.encode()
        for _ in range(80):
            if found.is_accepting() and rng.random() < 0.2:
                break
            mask = found.compute_bitmask()
            allowed = [t for t in range(32, 127) if mask[t >> 3] >> (t & 7) & 1]
            if not allowed:
                break
            token = rng.choice(allowed)
            assert found.try_consume_tokens([token]) == 1
            data.append(token)
        if not found.is_accepting():
            continue
        for name, content in re.findall(r"<fn=(.*?)>(.*?)</fn>", data.decode()):
            segments += 1
            value = json.loads(content)
            assert name in ("get", "num") and (0 <= value <= 99 if name == "num" else set(value) == {"city"})
        assert data.decode().count("<fn=") == data.decode().count("</fn>")
    assert segments >= 10


@pytest.mark.parametrize(
    ("tag", "says_what"),
    [
        ({}, "missing required field `structures`"),
        ({**LEGACY, "triggers": ["<tool"]}, "begins with none of the triggers"),
        ({**LEGACY, "triggers": ["<fn=", "<x"]}, "no tag begins with the trigger '<x'"),
        ({**LEGACY, "more": 1}, "unknown field `more`"),
        ({**LEGACY, "structures": []}, "length >= 1"),
        ({**LEGACY, "structures": [{"begin": "<fn=", "schema": {"not": {}}}]}, "not"),
        (
            {**LEGACY, "structures": [{"begin": "<fn=", "schema": {"uniqueItems": True, "type": "array"}}]},
            "uniqueItems",
        ),
        ({**LEGACY, "structures": [{"begin": "<fn=", "schema": False}]}, "allows nothing"),
        ({"format": {"type": "any_text"}}, "any_text"),
        ("{", "not valid"),
    ],
)
def test_what_is_wrong_is_named(tag: Any, says_what: str) -> None:
    with pytest.raises(RequestError) as caught:
        Grammars().grammar(StructuredOutputsParams(structural_tag=tag))
    assert says_what in str(caught.value) and caught.value.param == "structured_outputs"


@pytest.mark.parametrize("form", [LEGACY, MODERN], ids=["legacy", "modern"])
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_response_format(form: Any, route: str) -> None:
    engine = FakeEngine(rule=says("ab"))
    client = make_client(engine)
    body = {"prompt": "x"} if "chat" not in route else {"messages": [{"role": "user", "content": "x"}]}
    reply = client.post(route, json={**body, "response_format": form})
    assert reply.status_code == 200, reply.text
    assert "fn=" in (engine.submitted[0].grammar or "")
    wrong = client.post(
        route, json={**body, "response_format": {**form, "triggers": ["<x"], "structures": []}}
    )
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "response_format"
    both = client.post(route, json={**body, "response_format": form, "structured_outputs": {"regex": "a"}})
    assert both.status_code == 400
