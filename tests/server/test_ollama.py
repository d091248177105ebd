"""The real ``ollama`` package against a real socket, and a scripted engine behind it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ollama
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
NUM_TOKENS = len(TEXT.encode()) + 1
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>'
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells it",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
THINKS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}{% endif %}"
)


@contextmanager
def speaking(rule: Any, template: str | None = None, **settings: Any) -> Iterator[tuple[Live, ollama.Client]]:
    engine = FakeEngine(rule=rule, max_model_len=4096)
    given = {**settings, **({"template": template} if template else {})}
    with live_server(engine, **given) as live:
        host = live.url.removesuffix("/v1")
        with ollama.Client(host=host, headers={"authorization": "Bearer k"}) as client:
            yield live, client


def prompt_of(live: Live) -> str:
    ids = live.engine.submitted[-1].prompt_token_ids
    return make_tokenizer().decode(ids, skip_special_tokens=False)


def test_chat_whole_and_streamed() -> None:
    with speaking(says(TEXT), api_keys=("k",)) as (live, client):
        begin = time.perf_counter_ns()
        reply = client.chat("fake", MESSAGES)
        took = time.perf_counter_ns() - begin
        assert (reply.message.role, reply.message.content) == ("assistant", TEXT)
        assert (reply.done, reply.done_reason, reply.model) == (True, "stop", "fake")
        assert reply.eval_count == NUM_TOKENS
        assert reply.prompt_eval_count == len(live.engine.submitted[-1].prompt_token_ids)
        assert reply.total_duration is not None and 0 < reply.total_duration <= took
        parts = (reply.load_duration or 0) + (reply.prompt_eval_duration or 0) + (reply.eval_duration or 0)
        assert reply.load_duration == 0 and 0 < parts <= reply.total_duration
        lines = list(client.chat("fake:latest", MESSAGES, stream=True))
        assert "".join(part.message.content or "" for part in lines) == TEXT
        assert [part.done for part in lines] == [False] * (len(lines) - 1) + [True] and len(lines) > 2
        assert lines[-1].eval_count == NUM_TOKENS and lines[0].eval_count is None


def test_lines_are_json_and_streaming_is_the_default() -> None:
    reply = make_client(FakeEngine(rule=says("ab"))).post("/api/chat", json={"messages": MESSAGES})
    assert reply.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(part)["done"] for part in reply.text.splitlines()] == [False, True]


def test_options() -> None:
    with speaking(says(TEXT)) as (live, client):
        options: Any = {
            "num_predict": 4,
            "temperature": 0.3,
            "top_k": 7,
            "top_p": 0.8,
            "min_p": 0.1,
            "seed": 5,
            "stop": ["zz"],
            "repeat_penalty": 1.3,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.25,
            "num_ctx": 4096,
            "num_thread": 8,
            "mirostat": 0,
        }
        reply = client.chat("fake", MESSAGES, options=options, keep_alive="5m")
        assert (reply.done_reason, reply.eval_count) == ("length", 4)
        sampling = live.engine.submitted[-1].sampling
        for name in (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "seed",
            "presence_penalty",
            "frequency_penalty",
        ):
            assert getattr(sampling, name) == options[name], name
        assert (sampling.max_tokens, sampling.repetition_penalty) == (4, 1.3)
        assert sampling.stop_strings == ["zz"]
        client.chat("fake", MESSAGES, options={"num_predict": -1, "repeat_penalty": 1.3, "repeat_last_n": 0})
        assert live.engine.submitted[-1].sampling.repetition_penalty == 1.0


def test_generate_with_context_raw_and_system() -> None:
    with speaking(says("ok")) as (live, client):
        first = client.generate("fake", "Hi", system="S")
        assert first.response == "ok" and first.context is not None
        prompt = "<system>S</system><user>Hi</user><assistant>"
        told = make_tokenizer().encode(prompt + "ok", add_special_tokens=False)
        assert list(first.context) == [*told, EOS]
        client.generate("fake", "And?", context=first.context)
        assert prompt_of(live) == prompt + "ok<user>And?</user><assistant>" or prompt_of(live).startswith(
            prompt
        )
        raw = client.generate("fake", "just this", raw=True)
        assert prompt_of(live) == "just this" and raw.context is None
        parts = list(client.generate("fake", "Hi", stream=True))
        assert "".join(part.response for part in parts) == "ok" and parts[-1].context


def test_tools_whole_and_streamed() -> None:
    with speaking(says(f"So:\n{CALL}\n{CALL.replace('Köln', 'Bonn')}")) as (live, client):
        reply = client.chat("fake", MESSAGES, tools=TOOLS)
        calls = reply.message.tool_calls or []
        assert [(call.function.name, dict(call.function.arguments)) for call in calls] == [
            ("weather", {"city": "Köln", "days": 2}),
            ("weather", {"city": "Bonn", "days": 2}),
        ]
        assert reply.message.content == "So:" and reply.done_reason == "stop"
        parts = list(client.chat("fake", MESSAGES, tools=TOOLS, stream=True))
        streamed = [call for part in parts for call in part.message.tool_calls or []]
        assert [call.function.arguments for call in streamed] == [call.function.arguments for call in calls]
        assert "".join(part.message.content or "" for part in parts) == "So:"
        turns = [*MESSAGES, reply.message, {"role": "tool", "tool_name": "weather", "content": "sunny"}]
        client.chat("fake", turns, tools=TOOLS)
        assert '"arguments": {"city": "Köln", "days": 2}' in prompt_of(live) and "sunny" in prompt_of(live)


def test_thinking() -> None:
    tokens = [THINK, *b"let me think", END_THINK, *b"42", EOS]
    with speaking(lambda request, done: tokens[done : done + 3], THINKS) as (live, client):
        for think in (True, "low", None):
            reply = client.chat("fake", MESSAGES, think=think)  # type: ignore[call-overload]
            assert (reply.message.thinking, reply.message.content) == ("let me think", "42")
        parts = list(client.generate("fake", "Hi", think="high", stream=True))
        assert "".join(part.thinking or "" for part in parts) == "let me think"
        assert "".join(part.response for part in parts) == "42"
        watched = live.engine.submitted[-1].thinking
        assert watched is not None and watched.budget == 16384
        client.chat("fake", MESSAGES, think=False)
        assert prompt_of(live).endswith("<think></think>")
    with speaking(says("ok")) as (_, client):
        with pytest.raises(ollama.ResponseError, match="does not support thinking"):
            client.chat("fake", MESSAGES, think=True)
        client.chat("fake", MESSAGES, think=False)


@pytest.mark.parametrize("form", ["json", {"type": "object", "properties": {"a": {"type": "integer"}}}])
def test_format(form: Any) -> None:
    with speaking(says('{"a": 1}')) as (live, client):
        client.chat("fake", MESSAGES, format=form)
        assert live.engine.submitted[-1].grammar is not None
        client.generate("fake", "Hi", format=form)
        assert live.engine.submitted[-1].grammar is not None


def test_models() -> None:
    with speaking(says("ok")) as (_, client):
        assert [model.model for model in client.list().models] == ["fake", "alias"]
        running = client.ps().models
        assert running[0].model == "fake" and running[0].size_vram == 0 and running[0].context_length == 4096
        shown = client.show("fake")
        assert shown.capabilities == ["completion", "tools"] and shown.modelinfo is not None
        assert shown.modelinfo["fake.context_length"] == 4096
        assert client.pull("fake").status == "success"
        assert [part.status for part in client.pull("fake", stream=True)] == ["success"]
        for refused in (
            lambda: client.pull("llama3"),
            lambda: client.create("x", from_="fake"),
            lambda: client.delete("fake"),
            lambda: client.copy("fake", "y"),
            lambda: client.push("fake"),
        ):
            with pytest.raises(ollama.ResponseError) as caught:
                refused()
            assert caught.value.status_code == 501
        with pytest.raises(ollama.ResponseError) as missing:
            client.show("other")
        assert missing.value.status_code == 404
    assert set(make_client().get("/api/version").json()) == {"version"}


def test_a_request_for_nothing_says_that_the_model_is_loaded() -> None:
    with speaking(says("ok")) as (live, client):
        assert client.chat("fake").done_reason == "load"
        assert client.generate("fake").done_reason == "load"
        assert [part.done_reason for part in client.generate("fake", stream=True, keep_alive=0)] == ["load"]
        assert not live.engine.submitted


@pytest.mark.parametrize(
    ("path", "change", "words"),
    [
        ("chat", {"options": {"temperature": -1}}, "options.temperature"),
        ("chat", {"options": {"num_ctx": 8192}}, "server's context is 512"),
        ("chat", {"options": {"num_predict": 0}}, "num_predict"),
        ("chat", {"options": {"mirostat": 2}}, "options.mirostat"),
        ("chat", {"options": {"wrong": 2}}, "options.wrong"),
        ("chat", {"mesages": []}, "Did you mean messages"),
        ("chat", {"format": "xml"}, "format"),
        ("chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "reads text alone"),
        ("chat", {"messages": [{"role": "user", "content": "x" * 600}]}, "context"),
        ("generate", {"template": "{{ .Prompt }}"}, "--chat-template"),
        ("generate", {"suffix": "x"}, "suffix"),
        ("generate", {"raw": True, "system": "x"}, "system"),
        ("generate", {"context": [1, 300]}, "300"),
    ],
)
def test_errors_are_a_sentence(path: str, change: dict[str, Any], words: str) -> None:
    needed = {"messages": MESSAGES} if path == "chat" else {"prompt": "Hi"}
    reply = make_client().post(f"/api/{path}", json={**needed, **change})
    assert reply.status_code == 400, reply.text
    assert set(reply.json()) == {"error"} and words in reply.json()["error"]


def test_an_engine_that_dies_ends_the_stream_with_an_error_line() -> None:
    with (
        speaking(lambda request, done: [97]) as (live, client),
        pytest.raises(ollama.ResponseError, match="died"),
    ):
        for i, _ in enumerate(client.chat("fake", MESSAGES, stream=True)):
            if i == 5:
                live.call(live.engine.die)


def test_separators_of_unicode_do_not_cut_lines() -> None:
    text = "a\u2028b\u2029c\x85d"
    with speaking(says(text)) as (_, client):
        parts = list(client.chat("fake", MESSAGES, stream=True))
        assert "".join(part.message.content or "" for part in parts) == text
