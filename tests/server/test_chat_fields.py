"""Fields of chat beyond the usual: templates of requests, echo, functions (tools in older words), prompts as text."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from server_fake import FakeEngine, events_of, live_server, make_client, make_tokenizer, says

CHAT = "/v1/chat/completions"
USER: Any = [{"role": "user", "content": "Hi"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
FUNCTIONS: Any = [{"name": "weather", "parameters": {"type": "object"}}, {"name": "time"}]


def prompt_of(engine: FakeEngine) -> str:
    return make_tokenizer().decode(engine.submitted[-1].prompt_token_ids, skip_special_tokens=False)


def streamed(client: Any, body: dict[str, Any]) -> list[dict[str, Any]]:
    reply = client.post(CHAT, json={**body, "stream": True})
    assert reply.status_code == 200, reply.text
    return [event["choices"][0] for event in events_of(reply.text)]


def test_a_template_of_a_request_where_the_server_trusts_it() -> None:
    engine = FakeEngine(rule=says("x"))
    client = make_client(engine, trust_request_chat_template=True)
    source = "{% for m in messages %}[{{ m.content }}|{{ documents[0].text }}]{% endfor %}{{ mood }}"
    body = {
        "messages": USER,
        "chat_template": source,
        "chat_template_kwargs": {"mood": "!"},
        "documents": [{"text": "d"}],
    }
    for _ in range(2):  # the second time it is compiled already
        assert client.post(CHAT, json=body).status_code == 200
        assert prompt_of(engine) == "[Hi|d]!"
    reply = client.post("/tokenize", json={"messages": USER, "chat_template": "{{ messages[0].content }}"})
    assert reply.json()["tokens"] == [*b"Hi"]
    for n in range(40):
        assert client.post(CHAT, json={"messages": USER, "chat_template": f"{n}"}).status_code == 200
        assert prompt_of(engine) == str(n)


@pytest.mark.parametrize(
    ("source", "says_what"),
    [
        ("{% for %}", "not valid"),
        ("{% for i in range(10**9) %}{{ i }}{% endfor %}", "stopped"),
        ("{{ messages.__class__.__mro__ }}", "failed"),
        ("x" * 65_537, "65536"),
    ],
)
def test_bad_templates_of_requests_hurt_nobody(source: str, says_what: str) -> None:
    client = make_client(FakeEngine(), trust_request_chat_template=True)
    reply = client.post(CHAT, json={"messages": USER, "chat_template": source})
    assert reply.status_code == 400 and says_what in reply.json()["error"]["message"], reply.text
    assert client.post(CHAT, json={"messages": USER}).status_code == 200


@pytest.mark.parametrize("route", [CHAT, "/tokenize", f"{CHAT}/render"])
def test_templates_are_refused_by_default(route: str) -> None:
    reply = make_client().post(route, json={"messages": USER, "chat_template": "x"})
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["param"] == "chat_template"
    assert "--trust-request-chat-template" in error["message"]


def test_tokenize_knows_tools() -> None:
    client = make_client()
    tools = [{"type": "function", "function": function} for function in FUNCTIONS]
    plain, with_tools = (
        client.post("/tokenize", json={"messages": USER, **more}).json()["count"]
        for more in ({}, {"tools": tools})
    )
    assert with_tools > plain + 50


@pytest.mark.parametrize("n", [1, 2])
def test_echo_begins_with_the_open_message(n: int) -> None:
    client = make_client(FakeEngine(rule=says(" there.")))
    said = [*USER, {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}]
    body = {"messages": said, "echo": True, "continue_final_message": True, "n": n}
    choices = client.post(CHAT, json=body).json()["choices"]
    assert [choice["message"]["content"] for choice in choices] == ["Hello there."] * n
    texts = [""] * n
    for choice in streamed(client, body):
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == ["Hello there."] * n
    assert (
        client.post(CHAT, json={**body, "messages": USER, "continue_final_message": False}).json()["choices"][
            0
        ]["message"]["content"]
        == " there."
    )


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompt_as_text(stream: bool) -> None:
    body = {"messages": USER, "return_prompt_text": True, "stream": stream, "n": 2}
    reply = make_client(FakeEngine(rule=says("x"))).post(CHAT, json=body)
    told = events_of(reply.text) if stream else [reply.json()]
    assert [one["prompt_text"] for one in told if "prompt_text" in one] == ["<user>Hi</user><assistant>"]


def test_functions_are_answered_in_their_own_words() -> None:
    engine = FakeEngine(rule=says(f"So:\n{CALL}"), max_model_len=4096)
    client = make_client(engine)
    body = {"messages": USER, "functions": FUNCTIONS, "function_call": "auto"}
    choice = client.post(CHAT, json=body).json()["choices"][0]
    assert choice["finish_reason"] == "function_call" and choice["message"]["content"] == "So:"
    assert choice["message"]["function_call"] == {"name": "weather", "arguments": '{"city": "Ulm"}'}
    assert "tool_calls" not in choice["message"] and "weather" in prompt_of(engine)
    chunks = streamed(client, body)
    parts = [chunk["delta"]["function_call"] for chunk in chunks if "function_call" in chunk["delta"]]
    assert parts[0]["name"] == "weather"
    assert "".join(part.get("arguments", "") for part in parts) == '{"city": "Ulm"}'
    assert not any("tool_calls" in chunk["delta"] for chunk in chunks)
    assert chunks[-1]["finish_reason"] == "function_call"
    none = client.post(CHAT, json={**body, "function_call": "none"}).json()["choices"][0]
    assert none["message"]["content"].endswith(CALL) and none["finish_reason"] == "stop"


def test_a_function_by_name_must_be_called() -> None:
    engine = FakeEngine(rule=says(CALL), max_model_len=4096)
    body = {"messages": USER, "functions": FUNCTIONS, "function_call": {"name": "weather"}}
    assert make_client(engine).post(CHAT, json=body).status_code == 200
    grammar = engine.submitted[0].grammar
    assert grammar is not None and "weather" in str(grammar) and "time" not in str(grammar)


def test_the_old_conversation_goes_on() -> None:
    engine = FakeEngine(rule=says("Sunny."), max_model_len=4096)
    with (
        live_server(engine) as live,
        openai.OpenAI(base_url=live.url, api_key="x", max_retries=0, timeout=20) as client,
    ):
        messages: Any = [
            *USER,
            {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}},
            {"role": "function", "name": "weather", "content": "sun"},
        ]
        reply = client.chat.completions.create(model="fake", messages=messages, functions=FUNCTIONS)
        assert reply.choices[0].message.content == "Sunny." and reply.choices[0].finish_reason == "stop"
    assert "<tool_call>" in prompt_of(engine) and "<tool_response>\nsun" in prompt_of(engine)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"functions": FUNCTIONS, "tools": [{"type": "function", "function": {"name": "f"}}]}, "functions"),
        ({"functions": FUNCTIONS, "tool_choice": "auto"}, "function_call"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"functions": FUNCTIONS, "function_call": {"name": "f"}}, "tool_choice"),
        ({"functions": [{}]}, "functions[0].name"),
        ({"functions": FUNCTIONS, "function_call": "required"}, "function_call"),
    ],
)
def test_contradictions_are_named(body: dict[str, Any], param: str) -> None:
    reply = make_client().post(CHAT, json={"messages": USER, **body})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param, json.dumps(reply.json())
