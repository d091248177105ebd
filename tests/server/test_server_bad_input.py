"""Bad input: each a 4xx that names the field, and the server answers the next request as before."""

from __future__ import annotations

import socket
from typing import Any

import msgspec
import pytest
from server_fake import FakeEngine, live_server, make_app, make_client
from starlette.testclient import TestClient

from octavo.api.openai.schema import ChatCompletionRequest, CompletionRequest, not_yet

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
HUGE = 10**9


@pytest.fixture(scope="module")
def client() -> TestClient:
    return make_client(FakeEngine(max_model_len=64))


def is_up(client: TestClient) -> None:
    reply = client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 2})
    assert reply.status_code == 200, reply.text


def check(reply: Any, status: int, param: str | None) -> str:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    message: str = error["message"]
    assert message and "0x" not in message and "Traceback" not in message
    if param is not None and "prompt has" not in message:  # a conversation too long is called the prompt
        assert param.split(".")[-1].split("[")[0] in message
    return message


COMPLETION_TABLE: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["fine", ""]}, "prompt[1]"),
    ({"prompt": [1, -5]}, "prompt[1]"),
    ({"prompt": [1, 2**40]}, "prompt[1]"),
    ({"prompt": [1, 300]}, "prompt"),
    ({"prompt": [[1], [2, 300]]}, "prompt[1]"),
    ({"prompt": [1, True]}, "prompt[1]"),
    ({"prompt": [1, "a"]}, "prompt[1]"),
    ({"prompt": [1, 2.5]}, "prompt[1]"),
    ({"prompt": ["a", 1]}, "prompt[1]"),
    ({"prompt": [["a"]]}, "prompt[0][0]"),
    ({"prompt": [None]}, "prompt[0]"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({}, "prompt"),
    ({"prompt": "a" * 64}, "prompt"),
    ({"prompt": "a" * 1_000_000}, "prompt"),
    ({"prompt": [7] * 65}, "prompt"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 2**40}, "max_tokens"),
    ({"prompt": "a", "logprobs": -1}, "logprobs"),
    ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ({"prompt": "a", "logprobs": True}, "logprobs"),
    ({"prompt": ["a"] * 3000}, "prompt"),
    ({"prompt": ["a"] * 40, "n": 128}, "prompt"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "messages": MESSAGES}, "messages"),
]
COMMON_TABLE: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n"),
    ({"n": -1}, "n"),
    ({"n": HUGE}, "n"),
    ({"n": "2"}, "n"),
    ({"n": 1.5}, "n"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 1e9}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": []}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2**31}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": 2**63}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"stop": ["a", 3]}, "stop[1]"),
    ({"stop": "a" * 2000}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [300]}, "stop_token_ids"),
    ({"stop_token_ids": [0] * 2000}, "stop_token_ids"),
    ({"logit_bias": {"1": 200}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"300": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 2}, "min_tokens"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
    ),
    ({"user": 3}, "user"),
    ({"user": "u" * 2000}, "user"),
    ({"priority": 2**31}, "priority"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "s" * 300}, "cache_salt"),
    ({"request_id": "r" * 300}, "request_id"),
    ({"tempersture": 1}, "tempersture"),
    ({"model": ""}, "model"),
    ({"model": 3}, "model"),
]
CHAT_TABLE: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": ["Hi"]}, "messages[0]"),
    ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [*MESSAGES, {"role": "user", "content": 3}]}, "messages[1].content"),
    ({"messages": [{"role": "user", "content": "a" * 100}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}
            ]
        },
        "messages[0].content[0].type",
    ),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 3, "max_tokens": 4}, "max_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"prompt": "a"}, "prompt"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
]


@pytest.mark.parametrize(("body", "param"), COMPLETION_TABLE, ids=lambda value: str(value)[:60])
def test_completions_names_the_field(client: TestClient, body: dict[str, Any], param: str) -> None:
    check(client.post(COMPLETIONS, json=body), 400, param)
    is_up(client)


@pytest.mark.parametrize(("body", "param"), COMMON_TABLE, ids=lambda value: str(value)[:60])
def test_both_routes_name_the_field(client: TestClient, body: dict[str, Any], param: str) -> None:
    check(client.post(COMPLETIONS, json={"prompt": "a", **body}), 400, param)
    check(client.post(CHAT, json={"messages": MESSAGES, **body}), 400, param)
    is_up(client)


@pytest.mark.parametrize(("body", "param"), CHAT_TABLE, ids=lambda value: str(value)[:60])
def test_chat_names_the_field(client: TestClient, body: dict[str, Any], param: str) -> None:
    check(client.post(CHAT, json={"messages": MESSAGES, **body}), 400, param)
    is_up(client)


@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_first_token_of_a_stream_are_replies_not_events(
    client: TestClient, stream: bool
) -> None:
    reply = client.post(COMPLETIONS, json={"prompt": [300], "stream": stream})
    assert reply.headers["content-type"] == "application/json"
    check(reply, 400, "prompt")


@pytest.mark.parametrize("literal", [b"NaN", b"Infinity", b"-Infinity"])
def test_not_a_number_is_named(client: TestClient, literal: bytes) -> None:
    body = b'{"prompt": "a", "temperature": ' + literal + b', "top_p": 1}'
    reply = client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    check(reply, 400, "temperature")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"{",
        b'{"prompt": "a"',
        b"{'prompt': 'a'}",
        b"nonsense",
        b"\xff\xfe",
        b'{"prompt": "\xc3\x28"}',
        b'{"prompt": "a", "x": "\xff"}',
        b'{"prompt": ' + b"[" * 200_000,
        b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"logit_bias": ' + b'{"1":' * 200_000,
        b"[]",
        b"3",
        b'"prompt"',
        b"null",
        b'{"prompt": "a"} extra',
        b'\xef\xbb\xbf{"prompt": "a"}',
    ],
    ids=lambda body: str(body[:24]),
)
def test_broken_json(client: TestClient, body: bytes) -> None:
    reply = client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400, reply.text
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    is_up(client)


def test_unknown_model(client: TestClient) -> None:
    for path, body in (
        (CHAT, {"messages": MESSAGES}),
        (COMPLETIONS, {"prompt": "a"}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        reply = client.post(path, json={**body, "model": "gpt-9"})
        assert "gpt-9" in check(reply, 404, "model")
        assert reply.json()["error"]["code"] == "model_not_found"


def test_unknown_fields_get_a_hint_and_can_be_allowed() -> None:
    body = {"messages": MESSAGES, "max_token": 3}
    message = check(make_client().post(CHAT, json=body), 400, "max_token")
    assert "Did you mean max_tokens?" in message
    lenient = make_client(ignore_unknown_fields=True)
    assert lenient.post(CHAT, json=body).status_code == 200
    check(lenient.post(CHAT, json={**body, "n": 0}), 400, "n")


@pytest.mark.parametrize("kind", [ChatCompletionRequest, CompletionRequest])
def test_fields_that_would_do_nothing_are_refused(client: TestClient, kind: Any) -> None:
    path, needed = (
        (CHAT, {"messages": MESSAGES}) if kind is ChatCompletionRequest else (COMPLETIONS, {"prompt": "a"})
    )
    names = not_yet(kind)
    assert len(names) > 12
    for name in names:
        message = check(client.post(path, json={**needed, name: {"some": "value"}}), 400, name)
        assert "not supported yet" in message
        assert client.post(path, json={**needed, name: None}).status_code == 200


def test_neutral_values_are_accepted(client: TestClient) -> None:
    body = {
        "messages": MESSAGES,
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "best_of": 1,
        "store": False,
        "service_tier": "auto",
        "logit_bias": {},
        "stop": None,
        "seed": None,
        "temperature": None,
        "n": None,
        "max_tokens": 3,
        "user": "me",
    }
    assert client.post(CHAT, json=body).status_code == 200
    check(client.post(CHAT, json={**body, "best_of": True}), 400, "best_of")


def test_content_type_must_be_json(client: TestClient) -> None:
    body = msgspec.json.encode({"prompt": "a"})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        reply = client.post(COMPLETIONS, content=body, headers={"content-type": kind})
        assert reply.status_code == 415
    reply = client.post(
        COMPLETIONS, content=body, headers={"content-type": "application/json; charset=utf-8"}
    )
    assert reply.status_code == 200


def test_wrong_path_and_method(client: TestClient) -> None:
    assert check(client.get("/v1/nothing"), 404, None)
    assert check(client.get(CHAT), 405, None)
    assert check(client.post("/v1/models", json={}), 405, None)


def test_tokenize_needs_one_source(client: TestClient) -> None:
    check(client.post("/tokenize", json={}), 400, "prompt")
    check(client.post("/tokenize", json={"prompt": "a", "messages": MESSAGES}), 400, "prompt")
    check(client.post("/detokenize", json={"tokens": [300]}), 400, "tokens")
    check(client.post("/detokenize", json={"tokens": [-1]}), 400, "tokens[0]")
    check(client.post("/detokenize", json={}), 400, "tokens")


def test_declared_body_over_the_limit_is_refused_unread() -> None:
    client = TestClient(make_app(FakeEngine(), max_body_bytes=2000))
    reply = client.post(COMPLETIONS, json={"prompt": "a" * 3000})
    assert check(reply, 413, None)
    assert reply.json()["error"]["code"] == "payload_too_large"
    is_up(client)


def test_chunked_body_over_the_limit_is_refused() -> None:
    client = TestClient(make_app(FakeEngine(), max_body_bytes=2000))
    reply = client.post(
        COMPLETIONS, content=iter([b"x" * 600] * 9), headers={"content-type": "application/json"}
    )
    assert check(reply, 413, None)


def test_hundred_megabyte_body_over_a_socket() -> None:
    """The client reads 413, not a reset, although it is still sending; nothing of the body is kept."""
    with live_server(max_body_bytes=1 << 20) as live:
        with socket.create_connection(("127.0.0.1", live.port), timeout=20) as raw:
            size = 100 << 20
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n" % size
            )
            block, sent = b"x" * (1 << 20), 0
            try:
                while sent < size:
                    raw.sendall(block)
                    sent += len(block)
            except OSError:
                pass  # the server has stopped reading: the answer is there already
            answer = raw.recv(4096)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"payload_too_large" in answer
        with socket.create_connection(("127.0.0.1", live.port), timeout=20) as raw:
            raw.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert raw.recv(4096).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("kind", ["one header", "many headers", "long path"])
def test_huge_request_head_is_refused_early(kind: str) -> None:
    start = b"GET /" if kind == "long path" else b"GET /health HTTP/1.1\r\n"
    start += b"x-big: " if kind == "one header" else b""
    block = b"x-a: b\r\n" * 8000 if kind == "many headers" else b"y" * 64_000
    with (
        live_server(options={"max_header_bytes": 4096}) as live,
        socket.create_connection(("127.0.0.1", live.port), timeout=20) as raw,
    ):
        raw.sendall(start)
        sent = 0
        try:
            while sent < 64 << 20:
                raw.sendall(block)
                sent += len(block)
        except OSError:
            pass  # closed
        assert sent < 64 << 20, "the server read it all"


def test_request_head_over_the_limit_gets_an_answer() -> None:
    with (
        live_server(options={"max_header_bytes": 4096}) as live,
        socket.create_connection(("127.0.0.1", live.port), timeout=20) as raw,
    ):
        raw.sendall(b"GET /health HTTP/1.1\r\nx-big: " + b"y" * 5000)
        assert raw.recv(4096).startswith(b"HTTP/1.1 431 ")
