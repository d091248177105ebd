"""The real ``anthropic`` package against a real socket, and a scripted engine behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import pytest
from server_fake import (
    END_THINK,
    EOS,
    THINK,
    FakeEngine,
    Live,
    live_server,
    make_client,
    make_tokenizer,
    says,
)

TEXT = "Hello, wörld 🎉! How are you?"
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
ASK: Any = {"model": "fake", "max_tokens": 200, "messages": MESSAGES}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>'
TOOLS: Any = [
    {
        "name": "weather",
        "description": "Tells it",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
]
THINKS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{# <think></think> #}"
)


@contextmanager
def speaking(
    rule: Any, template: str | None = None, **settings: Any
) -> Iterator[tuple[Live, anthropic.Anthropic]]:
    engine = FakeEngine(rule=rule, max_model_len=4096)
    given = {**settings, **({"template": template} if template else {})}
    with (
        live_server(engine, **given) as live,
        anthropic.Anthropic(
            base_url=live.url.removesuffix("/v1"), api_key="sk-right", max_retries=0
        ) as client,
    ):
        yield live, client


def thinks(text: str, answer: str) -> Any:
    tokens = [THINK, *text.encode(), END_THINK, *answer.encode(), EOS]
    return lambda request, done: tokens[done : done + 3]


def texts_of(message: Any) -> list[str]:
    return [block.text for block in message.content if block.type == "text"]


def prompt_of(live: Live) -> str:
    ids = live.engine.submitted[-1].prompt_token_ids
    return make_tokenizer().decode(ids, skip_special_tokens=False)


def test_text_whole_and_streamed() -> None:
    with speaking(says(TEXT), api_keys=("sk-right",)) as (_, client):
        reply = client.messages.create(**ASK, system="Be kind", extra_body={"temperature": 0.5, "top_k": 5})
        assert reply.type == "message" and reply.role == "assistant" and reply.id.startswith("msg_")
        assert texts_of(reply) == [TEXT]
        assert (reply.stop_reason, reply.stop_sequence) == ("end_turn", None)
        usage = reply.usage
        assert usage.output_tokens == len(TEXT.encode()) + 1 and usage.cache_read_input_tokens == 2
        with client.messages.stream(
            **ASK, system="Be kind", extra_body={"temperature": 0.5, "top_k": 5}
        ) as stream:
            events = list(stream)
            final = stream.get_final_message()
        kinds = [event.type for event in events]
        assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
        assert "".join(event.text for event in events if event.type == "text") == TEXT
        assert texts_of(final) == [TEXT] and final.usage.output_tokens == usage.output_tokens
        assert final.usage.input_tokens == usage.input_tokens and final.stop_reason == "end_turn"


def test_the_wire_has_names_pings_and_an_end_of_its_own() -> None:
    body = {**ASK, "stream": True}
    text = make_client(FakeEngine(rule=says("ab"))).post("/v1/messages", json=body).text
    names = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]
    assert names == [
        *("message_start", "ping", "content_block_start", "content_block_delta"),
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    assert "[DONE]" not in text


def test_system_blocks_and_order_of_turns() -> None:
    with speaking(says("ok")) as (live, client):
        client.messages.create(
            model="fake",
            max_tokens=5,
            system=[{"type": "text", "text": "A", "cache_control": {"type": "ephemeral"}}],
            messages=[
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
                },
                {"role": "assistant", "content": "yes"},
                {"role": "user", "content": "three"},
            ],
        )
        assert prompt_of(live) == (
            "<system>A</system><user>one\ntwo</user><assistant>yes</assistant><user>three</user><assistant>"
        )


def test_stop_sequences_and_length() -> None:
    with speaking(says(TEXT)) as (_, client):
        reply = client.messages.create(**ASK, stop_sequences=["wör", "zzz"])
        assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", "wör")
        assert reply.content[0].type == "text" and reply.content[0].text == "Hello, "
        short = client.messages.create(**{**ASK, "max_tokens": 3})
        assert (short.stop_reason, short.usage.output_tokens) == ("max_tokens", 3)


def test_tools_whole_and_streamed() -> None:
    said = f"Let me see.\n{CALL}\n{CALL.replace('Köln', 'Bonn')}"
    with speaking(says(said)) as (live, client):
        reply = client.messages.create(**ASK, tools=TOOLS)
        assert reply.stop_reason == "tool_use"
        assert [block.type for block in reply.content] == ["text", "tool_use", "tool_use"]
        calls = [block for block in reply.content if block.type == "tool_use"]
        assert calls[0].name == "weather" and calls[0].input == {"city": "Köln", "days": 2}
        with client.messages.stream(**ASK, tools=TOOLS) as stream:
            pieces = [event.partial_json for event in stream if event.type == "input_json"]
            final = stream.get_final_message()
        assert len(pieces) > 8  # arguments come as they are written
        assert [block.type for block in final.content] == ["text", "tool_use", "tool_use"]
        assert [block.input for block in final.content if block.type == "tool_use"] == [
            c.input for c in calls
        ]
        results = [
            {
                "type": "tool_result",
                "tool_use_id": calls[0].id,
                "content": [{"type": "text", "text": "sunny"}],
            },
            {"type": "text", "text": "And?"},
        ]
        turns: Any = [
            *MESSAGES,
            {"role": "assistant", "content": reply.content},
            {"role": "user", "content": results},
        ]
        client.messages.create(model="fake", max_tokens=5, messages=turns, tools=TOOLS)
        prompt = prompt_of(live)
        assert '{"name": "weather", "arguments": {"city": "Köln", "days": 2}}' in prompt
        assert "<tool_response>\nsunny\n</tool_response>" in prompt and prompt.count("And?") == 1
        assert prompt.index("sunny") < prompt.index("And?")


@pytest.mark.parametrize(
    ("choice", "grammar"),
    [
        ({"type": "auto"}, False),
        ({"type": "any"}, True),
        ({"type": "tool", "name": "weather", "disable_parallel_tool_use": True}, True),
    ],
)
def test_tool_choice(choice: Any, grammar: bool) -> None:
    with speaking(says(CALL)) as (live, client):
        client.messages.create(**ASK, tools=TOOLS, tool_choice=choice)
        assert (live.engine.submitted[-1].grammar is not None) == grammar
        none = client.messages.create(**ASK, tools=TOOLS, tool_choice={"type": "none"})
        assert none.stop_reason == "end_turn" and "weather" not in prompt_of(live)


def test_thinking_and_its_budget() -> None:
    with speaking(thinks("let me think", "42"), THINKS) as (live, client):
        asked: Any = {**ASK, "thinking": {"type": "enabled", "budget_tokens": 50}}
        reply = client.messages.create(**asked)
        assert [block.type for block in reply.content] == ["thinking", "text"]
        assert reply.content[0].type == "thinking" and reply.content[0].thinking == "let me think"
        watched = live.engine.submitted[-1].thinking
        assert watched is not None and watched.budget == 50
        with client.messages.stream(**asked) as stream:
            pieces = [event.thinking for event in stream if event.type == "thinking"]
            assert "".join(pieces) == "let me think" and texts_of(stream.get_final_message()) == ["42"]
        client.messages.create(**ASK, thinking={"type": "disabled"})
        watched = live.engine.submitted[-1].thinking
        assert watched is not None and watched.budget == 0
        again: Any = [*MESSAGES, {"role": "assistant", "content": reply.content}, *MESSAGES]
        client.messages.create(model="fake", max_tokens=9, messages=again)  # thoughts can be sent back
        with pytest.raises(anthropic.BadRequestError, match="budget_tokens"):
            client.messages.create(**ASK, thinking={"type": "enabled"})  # type: ignore[typeddict-item]


def test_structured_answer_and_effort() -> None:
    with speaking(says('{"a": 1}')) as (live, client):
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        client.messages.create(
            **ASK, output_config={"format": {"type": "json_schema", "schema": schema}, "effort": "low"}
        )
        assert live.engine.submitted[-1].grammar is not None


def test_count_tokens() -> None:
    with speaking(says("ok")) as (live, client):
        counted = client.messages.count_tokens(model="fake", messages=MESSAGES, system="S", tools=TOOLS)
        assert not live.engine.submitted
        reply = client.messages.create(**ASK, system="S", tools=TOOLS)
        assert counted.input_tokens == reply.usage.input_tokens + (reply.usage.cache_read_input_tokens or 0)


def test_an_open_last_turn_is_gone_on_with() -> None:
    with speaking(says("ok")) as (live, client):
        client.messages.create(
            model="fake",
            max_tokens=5,
            messages=[*MESSAGES, {"role": "assistant", "content": "The answer is"}],
        )
        assert prompt_of(live).endswith("<assistant>The answer is")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_token": 1}, "Did you mean max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": ""}]}, "robot"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "is an image"),
        ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "sound"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "w", "input_schema": {}}]},
            "web_search_20250305",
        ),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "needs tools"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking.budget_tokens is set"),
        ({"stop_sequences": [""]}, "stop_sequences"),
    ],
)
def test_errors_have_anthropics_form_and_name_the_field(change: dict[str, Any], words: str) -> None:
    reply = make_client().post("/v1/messages", json={**ASK, **change})
    assert reply.status_code == 400, reply.text
    body = reply.json()
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert words in body["error"]["message"]


def test_other_errors() -> None:
    with speaking(says(TEXT), api_keys=("sk-other",)) as (_, client):
        with pytest.raises(anthropic.AuthenticationError) as caught:
            client.messages.create(**ASK)
        assert caught.value.body == {
            "error": {
                "type": "authentication_error",
                "message": "The API key is missing or wrong. Send the header Authorization: Bearer KEY.",
            },
            "type": "error",
        }
    with speaking(says(TEXT)) as (live, client):
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(**{**ASK, "model": "other"})
        live.engine.queue_limit = 0
        with pytest.raises(anthropic.RateLimitError) as limited:
            client.messages.create(**ASK)
        assert limited.value.response.headers["retry-after"] == "3"


def test_an_engine_that_dies_ends_the_stream_with_an_error_event() -> None:
    with speaking(lambda request, done: [97]) as (live, client):
        with (
            pytest.raises(anthropic.APIStatusError) as caught,
            client.messages.stream(**{**ASK, "max_tokens": 3000}) as stream,
        ):
            for i, _ in enumerate(stream):
                if i == 5:
                    live.call(live.engine.die)
        assert "overloaded_error" in str(caught.value.body)
