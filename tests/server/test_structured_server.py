"""Structured output over HTTP: what is refused, what reaches the engine, and the real openai client."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from server_fake import FakeEngine, live_server, make_client, says
from starlette.testclient import TestClient

from octavo.api.structured import Grammars
from octavo.errors import RequestError
from octavo.protocol.generate import SamplingParams, StructuredOutputsParams

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(rule=says('{"a": 1}'))


@pytest.fixture
def client(engine: FakeEngine) -> TestClient:
    return make_client(engine)


@pytest.mark.parametrize(
    ("fields", "mark"),
    [
        ({"structured_outputs": {"json": SCHEMA}}, '"integer"'),
        ({"structured_outputs": {"json": msgspec.json.encode(SCHEMA).decode()}}, '"integer"'),
        ({"structured_outputs": {"json_object": True}}, '"object"'),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, "[0-9]{3}"),
        ({"structured_outputs": {"choice": ["yes", 'n"o']}}, '"yes" | "n\\"o"'),
        ({"structured_outputs": {"grammar": 'start: "a" start | "b"'}}, 'start: "a" start'),
        ({"response_format": {"type": "json_object"}}, '"object"'),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}}, '"a"'),
        ({"response_format": {"type": "text"}}, None),
    ],
)
def test_the_engine_gets_a_grammar(
    client: TestClient, engine: FakeEngine, fields: dict[str, Any], mark: str | None
) -> None:
    for path, more in (
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/completions", {"prompt": "a"}),
    ):
        reply = client.post(path, json={**more, **fields, "max_tokens": 20, "n": 2})
        assert reply.status_code == 200, reply.text
    assert len(engine.submitted) == 4
    for request in engine.submitted:
        assert request.sampling.structured_outputs is None
        assert request.grammar is None if mark is None else mark in (request.grammar or "")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "regex, choice"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"json": {"type": "string", "not": {}}}}, "structured_outputs", '"not"'),
        ({"structured_outputs": {"json": {"uniqueItems": True}}}, "structured_outputs", "uniqueItems"),
        (
            {"structured_outputs": {"json": {"x-guidance": {"lenient": True}, "not": {}}}},
            "structured_outputs",
            "not",
        ),
        ({"structured_outputs": {"json": {"type": "banana"}}}, "structured_outputs", "banana"),
        (
            {"structured_outputs": {"json": {"$ref": "http://localhost/x"}}},
            "structured_outputs",
            "not present",
        ),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "not JSON"),
        ({"structured_outputs": {"json": "[1]"}}, "structured_outputs", "object"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs", "look-around"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed"),
        ({"structured_outputs": {"grammar": "start: missing"}}, "structured_outputs", "missing"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "length"),
        ({"structured_outputs": {"regexp": "x"}}, "structured_outputs.regexp", "nknown"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "needs"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"contains": {}}},
                }
            },
            "response_format",
            "contains",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "response_format",
            "exclude",
        ),
        ({"guided_json": SCHEMA}, "guided_json", "not supported"),
    ],
)
def test_what_cannot_be_served_is_named(
    client: TestClient, engine: FakeEngine, fields: dict[str, Any], param: str, words: str
) -> None:
    for path, more in (
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/completions", {"prompt": "a"}),
    ):
        reply = client.post(path, json={**more, **fields})
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        assert error["param"] == param and words in error["message"], error
    assert engine.submitted == []


PATHOLOGICAL: list[dict[str, Any]] = [
    {"regex": "(a+)+$" * 200},
    {"regex": "((a{0,100}){0,100}){0,100}b"},
    {"regex": "(.*a){30}.*b.{200}"},
    {"regex": "(" * 5000 + ")" * 5000},
    {"regex": "a{1000000000}"},
    {"json": '{"items":' * 5000 + "{}" + "}" * 5000},
    {"json": {"enum": [f"value {i}" for i in range(10_000)]}},
    {"json": {"properties": {f"p{i}": {"type": "string", "pattern": "[a-z]{1,40}"} for i in range(1000)}}},
    {"json": {"$ref": "#"}},
    {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}},
    {"grammar": "start: " + "a " * 20_000 + "\na: start |"},
    {"choice": ["x" * 4096] * 60},
]


@pytest.mark.parametrize("fields", PATHOLOGICAL, ids=range(len(PATHOLOGICAL)))
def test_pathological_patterns_are_answered_soon(fields: dict[str, Any]) -> None:
    """A request's pattern is judged within two seconds of processor time, whatever it is (CVE-2026-55574)."""
    begin = time.process_time()
    try:
        Grammars().grammar(StructuredOutputsParams(**fields))
    except RequestError as error:
        assert error.param == "structured_outputs"
    assert time.process_time() - begin < 2


KEYWORDS = (
    "type not enum const pattern format items properties required anyOf $ref minimum maxLength multipleOf "
    "additionalProperties prefixItems allOf oneOf if $defs"
)
keywords = st.sampled_from(KEYWORDS.split())
schemas = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.sampled_from(["string", "object", "(", "#", "[a-z]+"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keywords, inner, max_size=4),
    max_leaves=12,
)


@given(schema=st.dictionaries(keywords, schemas, max_size=4))
@settings(max_examples=200, deadline=None)
def test_any_schema_is_a_grammar_or_an_error_of_ours(schema: dict[str, Any]) -> None:
    try:
        Grammars().grammar(StructuredOutputsParams(json=schema))
    except RequestError as error:
        assert error.param == "structured_outputs" and len(error.cause) < 1000


@given(text=st.text(min_size=1, max_size=30), kind=st.sampled_from(["regex", "grammar"]))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_grammar_or_an_error_of_ours(text: str, kind: str) -> None:
    try:
        Grammars().grammar(StructuredOutputsParams(**{kind: text}))
    except RequestError as error:
        assert error.param is not None and error.param.startswith("structured_outputs")


@given(
    choices=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), min_size=1, max_size=4
    )
)
@settings(max_examples=100, deadline=None)
def test_choices_may_be_any_texts(choices: list[str]) -> None:
    grammar = Grammars().grammar(StructuredOutputsParams(choice=choices))
    assert not LLMatcher.validate_grammar(grammar)
    assert grammar.startswith("start: ")


def test_sampling_params_take_a_dictionary() -> None:
    params = SamplingParams(structured_outputs={"regex": "a+"})  # type: ignore[arg-type]
    assert params.structured_outputs == StructuredOutputsParams(regex="a+")
    with pytest.raises(RequestError, match="exactly one"):
        SamplingParams(structured_outputs={})  # type: ignore[arg-type]
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    assert again == params


def test_objects_can_be_closed() -> None:
    params = StructuredOutputsParams(json={"anyOf": [SCHEMA]}, disable_additional_properties=True)
    assert '"additionalProperties":false' in Grammars().grammar(params)


def test_openai_client_parses_into_a_model() -> None:
    import openai
    from pydantic import BaseModel

    class Answer(BaseModel):
        a: int

    with (
        live_server(FakeEngine(rule=says('{"a": 12}'))) as live,
        openai.OpenAI(base_url=live.url, api_key="x", max_retries=0, timeout=20) as client,
    ):
        reply = client.chat.completions.parse(
            model="fake", messages=[{"role": "user", "content": "Hi"}], response_format=Answer
        )
        assert reply.choices[0].message.parsed == Answer(a=12)
        assert '"title":"Answer"' in (live.engine.submitted[0].grammar or "")
        extra = {"structured_outputs": {"choice": ["x"]}}
        client.completions.create(model="fake", prompt="a", max_tokens=5, extra_body=extra)
        assert live.engine.submitted[1].grammar == 'start: "x"'
