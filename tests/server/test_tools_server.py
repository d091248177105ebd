"""Tool calling over HTTP with the real openai client and an engine that says exactly what it is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from server_fake import FakeEngine, Live, events_of, live_server, make_client, make_tokenizer, says
from test_tools_parse import LLAMA, MISTRAL_V3, MISTRAL_V11, QWEN

from octavo.api.chat.formats.families import GENERIC, HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_NAMED
from octavo.api.chat.formats.tools import ToolSyntax
from octavo.api.chat.tools import ToolDefinition, ToolGrammar
from octavo.engine.structured.vocabulary import Vocabulary, build_tables

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "time"}},
]
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "K\u00f6ln", "days": 2}}\n</tool_call>'
ARGS = '{"city": "K\u00f6ln", "days": 2}'


def prompt_of(engine: FakeEngine, which: int = -1) -> str:
    return make_tokenizer().decode(engine.submitted[which].prompt_token_ids, skip_special_tokens=False)


@contextmanager
def speaking(text: str, template: str | None = None, **engine: Any) -> Iterator[tuple[Live, openai.OpenAI]]:
    """A server whose model says ``text``."""
    fake = FakeEngine(rule=says(text), max_model_len=4096, **engine)
    with (
        live_server(fake, template=template) if template else live_server(fake) as live,
        openai.OpenAI(base_url=live.url, api_key="x", max_retries=0, timeout=20) as client,
    ):
        yield live, client


def test_call_whole_and_streamed() -> None:
    with speaking(f"Let me see.\n{CALL}\n{CALL.replace('weather', 'time')}") as (live, client):
        reply = client.chat.completions.create(model="fake", messages=MESSAGES, tools=TOOLS)
        choice = reply.choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
        calls = choice.message.tool_calls or []
        assert [(call.type, call.function.name, call.function.arguments) for call in calls] == [  # type: ignore[union-attr]
            ("function", "weather", ARGS),
            ("function", "time", ARGS),
        ]
        assert "weather" in prompt_of(live.engine) and '"days"' in prompt_of(live.engine)
        stream = client.chat.completions.create(model="fake", messages=MESSAGES, tools=TOOLS, stream=True)
        chunks = [chunk.choices[0] for chunk in stream]
        assert "".join(chunk.delta.content or "" for chunk in chunks) == "Let me see."
        deltas = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
        starts = [call for call in deltas if call.id]
        assert [(call.index, call.function.name, call.function.arguments) for call in starts] == [  # type: ignore[union-attr]
            (0, "weather", ""),
            (1, "time", ""),
        ]
        for index in range(2):
            mine = [call.function.arguments or "" for call in deltas if call.index == index]  # type: ignore[union-attr]
            assert "".join(mine) == ARGS and len(mine) > 5  # arguments come while they are made
        assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]
        with client.chat.completions.stream(model="fake", messages=MESSAGES, tools=TOOLS) as helper:
            final = helper.get_final_completion().choices[0].message
        assert [call.function.name for call in final.tool_calls or []] == ["weather", "time"]


def test_the_conversation_goes_on_with_results() -> None:
    with speaking(CALL) as (live, client):
        said: Any = (
            client.chat.completions.create(model="fake", messages=MESSAGES, tools=TOOLS).choices[0].message
        )
        result = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "sunny"}
        client.chat.completions.create(
            model="fake", messages=[*MESSAGES, said.model_dump(), result], tools=TOOLS
        )
        prompt = prompt_of(live.engine)
        assert (
            '{"name": "weather", "arguments": {"city": "K\u00f6ln", "days": 2}}' in prompt
            and "sunny" in prompt
        )


def test_text_without_calls_and_cut_calls() -> None:
    client = make_client(FakeEngine(rule=says(f"a <b> {CALL}"), max_model_len=4096))
    body = {"messages": MESSAGES, "tools": TOOLS}
    cut = client.post("/v1/chat/completions", json={**body, "max_tokens": 70}).json()["choices"][0]
    assert cut["finish_reason"] == "length"
    assert cut["message"]["tool_calls"][0]["function"]["arguments"].startswith("{")
    short = client.post("/v1/chat/completions", json={**body, "max_tokens": 12}).json()["choices"][0]
    assert short["message"]["content"] == "a <b> <tool_" and "tool_calls" not in short["message"]
    none = client.post("/v1/chat/completions", json={**body, "tool_choice": "none"}).json()["choices"][0]
    assert none["message"]["content"] == f"a <b> {CALL}" and none["finish_reason"] == "stop"


def test_one_call_only_where_asked() -> None:
    client = make_client(FakeEngine(rule=says(CALL + CALL), max_model_len=4096))
    body = {"messages": MESSAGES, "tools": TOOLS, "parallel_tool_calls": False}
    assert (
        len(client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["tool_calls"]) == 1
    )


@pytest.mark.parametrize(
    ("template", "text", "mark"),
    [
        (QWEN, CALL, "# Tools"),
        (LLAMA, '{"name": "weather", "parameters": ' + ARGS + "}", "Respond in the format"),
        (MISTRAL_V3, '[TOOL_CALLS][{"name": "weather", "arguments": ' + ARGS + "}]", "[AVAILABLE_TOOLS]"),
        (MISTRAL_V11, "[TOOL_CALLS]weather[ARGS]" + ARGS, "weather"),
        (None, CALL, "You can call functions"),
    ],
)
def test_each_template_in_its_own_format(template: str | None, text: str, mark: str) -> None:
    engine = FakeEngine(rule=says(text), max_model_len=4096)
    client = make_client(engine, **({"template": template} if template else {}))
    body = {"messages": MESSAGES, "tools": TOOLS}
    message = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert message["content"] is None
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "weather", "arguments": ARGS}]
    assert mark in prompt_of(engine) and engine.submitted[0].grammar is None
    events = events_of(client.post("/v1/chat/completions", json={**body, "stream": True}).text)
    pieces = [c for e in events for c in e["choices"][0]["delta"].get("tool_calls", [])]
    assert "".join(piece["function"]["arguments"] for piece in pieces) == ARGS


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "'f'"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice",
            "'f'",
        ),
        ({"tools": TOOLS + TOOLS}, "tools[2]", "twice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice", "sometimes"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format", "exclude"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}
                ]
            },
            "tools[0].function.parameters",
            '"not"',
        ),
    ],
)
def test_contradictions_are_named(fields: dict[str, Any], param: str, words: str) -> None:
    engine = FakeEngine()
    reply = make_client(engine).post("/v1/chat/completions", json={"messages": MESSAGES, **fields})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == param and words in error["message"], error
    assert not engine.submitted


def test_schemas_that_cannot_be_enforced_are_advice_unless_strict() -> None:
    engine = FakeEngine(max_model_len=4096)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]
    body = {"messages": MESSAGES, "tools": tools, "tool_choice": "required"}
    assert make_client(engine).post("/v1/chat/completions", json=body).status_code == 200
    assert 'args_0: %json {"type": "object"}' in (engine.submitted[0].grammar or "")


# -- grammars -----------------------------------------------------------------------------------------------------


TABLES: LLTokenizer = build_tables(
    Vocabulary(
        [*(bytes([i]) for i in range(256)), b"<s>", b"</s>"],
        frozenset({256, 257}),
        (257,),
        lambda t: list(t.encode()),
    ),
    300,
)
DEFINED = [ToolDefinition("weather", None, WEATHER, True), ToolDefinition('ti"me')]


def accepts(grammar: str, text: str) -> bool:
    """Whether ``text`` is a whole answer of the grammar."""
    matcher = LLMatcher(TABLES, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.try_consume_tokens(list(text.encode())) == len(text.encode()) and matcher.is_accepting()


def written(syntax: ToolSyntax, calls: list[tuple[str, str]]) -> str:
    if syntax.args_mark:
        return "".join(f"{syntax.begin}{name}{syntax.args_mark}{args}" for name, args in calls)
    bodies = [f'{{"name": {json.dumps(name)}, "{syntax.args_key}": {args}}}' for name, args in calls]
    if syntax.end:
        return "\n".join(f"{syntax.begin}\n{body}\n{syntax.end}" for body in bodies)
    joined = syntax.separator.join(bodies)
    return f"{syntax.begin}[{joined}]" if syntax.is_list else joined


@pytest.mark.parametrize(
    "syntax", [HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_NAMED, GENERIC], ids=lambda s: s.name
)
def test_grammars_of_calls(syntax: ToolSyntax) -> None:
    good, other = ("weather", ARGS), ('ti"me', "{}")
    bad = [
        ("weather", '{"days": 2}'),
        ("weather", '{"city": "x", "days": 10}'),
        ("nothing", "{}"),
        ('ti"me', '{"x": 1}'),
    ]
    tools = list(enumerate(DEFINED))
    must = ToolGrammar(syntax, make_tokenizer()).text(tools, True, True)
    assert accepts(must, written(syntax, [good])) and accepts(must, written(syntax, [other, good, other]))
    assert (
        not accepts(must, "")
        and not accepts(must, "Hello")
        and not accepts(must, "x" + written(syntax, [good]))
    )
    for call in bad:
        assert not accepts(must, written(syntax, [call])), call
    single = ToolGrammar(syntax, make_tokenizer()).text(tools, True, False)
    assert accepts(single, written(syntax, [good])) and not accepts(single, written(syntax, [good, good]))
    named = ToolGrammar(syntax, make_tokenizer()).text(tools[:1], True, False)
    assert accepts(named, written(syntax, [good])) and not accepts(named, written(syntax, [other]))
    free = ToolGrammar(syntax, make_tokenizer()).text(tools, False, True)
    assert accepts(free, "Hello, {x}") and accepts(free, "") and accepts(free, written(syntax, [good, other]))
    for call in bad:
        assert not accepts(free, written(syntax, [call])), call
    if syntax.end:
        assert accepts(
            free, "I say\n" + written(syntax, [good]) + " and\n" + written(syntax, [other]) + " done"
        )


@given(
    text=st.text(max_size=20),
    step=st.integers(1, 7),
    calls=st.integers(0, 2),
    tail=st.sampled_from(["", "\n", " bye", "<tool_call>", CALL[:40]]),
)
@settings(max_examples=60, deadline=None)
def test_stream_equals_whole(text: str, step: int, calls: int, tail: str) -> None:
    said = text + "\n".join([CALL] * calls) + tail
    client = make_client(FakeEngine(rule=says(said, step=step), max_model_len=8192))
    body = {"messages": MESSAGES, "tools": TOOLS, "return_token_ids": True, "logprobs": True}
    whole = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    events = events_of(client.post("/v1/chat/completions", json={**body, "stream": True}).text)
    choices = [event["choices"][0] for event in events]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == (
        whole["message"]["content"] or ""
    )
    folded: dict[int, list[str]] = {}
    for choice in choices:
        for call in choice["delta"].get("tool_calls", []):
            entry = folded.setdefault(call["index"], ["", ""])
            entry[0] += call["function"].get("name", "")
            entry[1] += call["function"].get("arguments", "")
    made = [
        [c["function"]["name"], c["function"]["arguments"]] for c in whole["message"].get("tool_calls", [])
    ]
    assert [folded[i] for i in sorted(folded)] == made
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == [
        whole["finish_reason"]
    ]
    assert [i for choice in choices for i in choice.get("token_ids", [])] == whole["token_ids"]
    assert sum(len(choice["logprobs"]["content"]) for choice in choices if choice["logprobs"]) == len(
        whole["token_ids"]
    )
