"""Replies of both routes: shapes, and a stream that says the same as a whole reply."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_fake import EOS, FakeEngine, events_of, make_client, says

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


def fold(chunks: list[dict[str, Any]], chat: bool) -> dict[int, dict[str, Any]]:
    """The choices that the events of a stream add up to."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            empty = {
                "text": "",
                "logprobs": None,
                "finish_reason": None,
                "stop_reason": None,
                "token_ids": [],
            }
            whole = choices.setdefault(part["index"], empty)
            whole["text"] += (part["delta"].get("content") or "") if chat else part["text"]
            whole["token_ids"] = whole["token_ids"] + part.get("token_ids", [])
            if part["logprobs"] is not None:
                if whole["logprobs"] is None:
                    whole["logprobs"] = {key: [] for key in part["logprobs"] if key != "refusal"}
                for key, rows in whole["logprobs"].items():
                    rows += part["logprobs"][key]
            if part["finish_reason"] is not None:
                assert whole["finish_reason"] is None, "a choice ended twice"
                whole["finish_reason"], whole["stop_reason"] = part["finish_reason"], part["stop_reason"]
            elif "stop_reason" in part:
                raise AssertionError("stop_reason before the end")
    return choices


def whole_choices(reply: dict[str, Any], chat: bool) -> dict[int, dict[str, Any]]:
    made = {}
    for choice in reply["choices"]:
        logprobs = choice["logprobs"]
        if logprobs is not None:
            logprobs = {key: rows for key, rows in logprobs.items() if key != "refusal"}
        made[choice["index"]] = {
            "text": choice["message"]["content"] if chat else choice["text"],
            "logprobs": logprobs,
            "finish_reason": choice["finish_reason"],
            "stop_reason": choice["stop_reason"],
            "token_ids": choice.get("token_ids", []),
        }
    return made


requests = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(1, 3),
        "max_tokens": st.integers(1, 40),
        "stop": st.lists(st.sampled_from(["a", "be", "c ", "é", "ef", "zz"]), min_size=1, max_size=3),
        "include_stop_str_in_output": st.booleans(),
        "stop_token_ids": st.lists(st.integers(97, 105), max_size=2),
        "ignore_eos": st.booleans(),
        "return_token_ids": st.booleans(),
        "return_tokens_as_token_ids": st.booleans(),
        "stream_options": st.fixed_dictionaries(
            {}, optional={"include_usage": st.booleans(), "continuous_usage_stats": st.booleans()}
        ),
    },
)
texts = st.text(st.sampled_from('abcdefg é🎉\n"\\'), max_size=30)


@settings(max_examples=40, deadline=None)
@given(
    text=texts,
    step=st.integers(1, 5),
    body=requests,
    top=st.none() | st.integers(0, 3),
    chat=st.booleans(),
    echo=st.booleans(),
    several=st.booleans(),
)
def test_a_stream_says_the_same_as_a_whole_reply(
    text: str, step: int, body: dict[str, Any], top: int | None, chat: bool, echo: bool, several: bool
) -> None:
    if body.get("ignore_eos"):
        body = {**body, "max_tokens": min(body.get("max_tokens", 5), len(text.encode()) + 1)}
    if chat:
        body = {**body, "messages": MESSAGES}
        if top is not None:
            body = {**body, "logprobs": True, "top_logprobs": top}
    else:
        body = {**body, "prompt": ["né", "x"] if several else "né", "echo": echo, "logprobs": top}
    path = CHAT if chat else COMPLETIONS
    plain = {key: value for key, value in body.items() if key != "stream_options"}
    whole = make_client(FakeEngine(rule=says(text, step=step))).post(path, json=plain)
    assert whole.status_code == 200, whole.text
    stream = make_client(FakeEngine(rule=says(text, step=step))).post(path, json={**body, "stream": True})
    assert stream.status_code == 200, stream.text
    events = events_of(stream.text)
    assert fold(events, chat) == whole_choices(whole.json(), chat)
    options = body.get("stream_options", {})
    usages = [event["usage"] for event in events if event.get("usage") is not None]
    if options.get("include_usage"):
        assert events[-1]["choices"] == [] and events[-1]["usage"] == whole.json()["usage"]
        assert all("usage" in event for event in events)
    elif not options.get("continuous_usage_stats"):
        assert not usages
    assert len({event["id"] for event in events}) == 1


def test_chat_reply_shape() -> None:
    engine = FakeEngine()
    reply = make_client(engine).post(
        CHAT, json={"messages": MESSAGES, "model": "alias", "request_id": "mine"}
    )
    body = reply.json()
    assert body["id"] == "chatcmpl-mine"
    assert body["object"] == "chat.completion"
    assert body["model"] == "alias"
    assert body["system_fingerprint"].startswith("fp_")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello, wörld 🎉! How are you?", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    num_prompt = len(b"<user>Hi</user><assistant>")
    num_output = len("Hello, wörld 🎉! How are you?".encode()) + 1  # and the end of sequence
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert bytes(engine.submitted[0].prompt_token_ids) == b"<user>Hi</user><assistant>"


def test_chat_stream_shape() -> None:
    reply = make_client(FakeEngine(rule=says("abcdef"))).post(
        CHAT, json={"messages": MESSAGES, "stream": True}
    )
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    first, second, *_, last = events_of(reply.text)
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert second["choices"][0]["delta"] == {"content": "abc"}
    assert second["choices"][0]["finish_reason"] is None
    assert last["choices"][0]["finish_reason"] == "stop"


def test_every_choice_of_a_stream_opens_with_the_role() -> None:
    reply = make_client().post(CHAT, json={"messages": MESSAGES, "stream": True, "n": 3})
    opened = [
        choice["index"]
        for event in events_of(reply.text)
        for choice in event["choices"]
        if choice["delta"].get("role") == "assistant"
    ]
    assert sorted(opened) == [0, 1, 2]


def test_chunks_of_one_engine_step_leave_together() -> None:
    """Three choices advance in one step: the reply is written at most once a step, not once a choice."""
    sent: list[bytes] = []
    engine = FakeEngine(rule=says("abcdef"))
    client = make_client(engine)
    app = client.app

    async def spy(scope: Any, receive: Any, send: Any) -> None:
        async def record(message: dict[str, Any]) -> None:
            if message.get("body"):
                sent.append(message["body"])
            await send(message)

        await app(scope, receive, record)

    client = type(client)(spy)
    client.post(COMPLETIONS, json={"prompt": "x", "n": 3, "stream": True})
    counts = [body.count(b"data: ") for body in sent]
    assert sum(counts) == 3 * 3 + 1  # three choices, three steps, [DONE]
    assert all(count % 3 == 0 for count in counts[:-1]) and counts[-1] == 1


def test_logprobs_of_chat() -> None:
    client = make_client(FakeEngine(rule=says("é")))
    body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "max_tokens": 2}
    content = client.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
    assert [row["bytes"] for row in content] == [[0xC3], [0xA9]]
    assert content[0]["logprob"] == -0.5
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.25, -0.5]
    body = {"messages": MESSAGES, "logprobs": True, "max_tokens": 1}
    assert client.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_logprobs_and_echo_of_completions() -> None:
    body = {"prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": 2}
    choice = make_client(FakeEngine(rule=says("xyz"))).post(COMPLETIONS, json=body).json()["choices"][0]
    assert choice["text"] == "abxy"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "x", "y"],
        "token_logprobs": [None, -0.5, -0.5, -0.5],
        "top_logprobs": [
            None,
            {"b": -0.5, "c": -0.25},
            {"x": -0.5, "y": -0.25},
            {"y": -0.5, "z": -0.25},
        ],
        "text_offset": [0, 1, 2, 3],
    }
    body = {"prompt": "ab", "logprobs": 0, "max_tokens": 1, "return_tokens_as_token_ids": True}
    logprobs = (
        make_client(FakeEngine(rule=says("x"))).post(COMPLETIONS, json=body).json()["choices"][0]["logprobs"]
    )
    assert logprobs["tokens"] == [f"token_id:{ord('x')}"]
    assert logprobs["top_logprobs"] == [None]


@pytest.mark.parametrize("stream", [False, True])
def test_scoring_a_text(stream: bool) -> None:
    """echo with max_tokens 0: the prompt and its log probabilities, and no token counted."""
    body = {"prompt": "abc", "echo": True, "max_tokens": 0, "logprobs": 1, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    reply = make_client().post(COMPLETIONS, json=body)
    if stream:
        events = events_of(reply.text)
        choice, usage = fold(events, chat=False)[0], events[-1]["usage"]
    else:
        choice, usage = reply.json()["choices"][0], reply.json()["usage"]
    assert choice["text"] == "abc"
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert choice["finish_reason"] == "length"
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 0)


def test_prompt_forms() -> None:
    client = make_client(FakeEngine(rule=says("ok")))
    for prompt, texts in (
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([97, 98], ["ab"]),
        ([[97, 98], [99]], ["ab", "c"]),
    ):
        body = {"prompt": prompt, "echo": True, "max_tokens": 2, "return_token_ids": True}
        choices = client.post(COMPLETIONS, json=body).json()["choices"]
        assert [choice["text"] for choice in choices] == [text + "ok" for text in texts]
        assert [choice["prompt_token_ids"] for choice in choices] == [list(text.encode()) for text in texts]
        assert [choice["token_ids"] for choice in choices] == [list(b"ok")] * len(texts)
    assert client.post(COMPLETIONS, json={"prompt": ["a", "b"], "n": 2}).json()["usage"]["prompt_tokens"] == 2


def test_fields_reach_the_engine() -> None:
    engine = FakeEngine(rule=says("x"))
    body = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 0.2,
        "frequency_penalty": 0.3, "repetition_penalty": 1.1, "seed": 5, "min_tokens": 1, "max_tokens": 9,
        "logit_bias": {"97": -1.5}, "stop_token_ids": [98], "ignore_eos": True, "stop": "zz",
    }  # fmt: skip
    extra = {"priority": -3, "cache_salt": "salt"}
    make_client(engine).post(COMPLETIONS, json={"prompt": "ab", **body, **extra})
    (request,) = engine.submitted
    expected = {**body, "logit_bias": {97: -1.5}}
    assert {name: getattr(request.sampling, name) for name in body} == expected
    assert (request.priority, request.cache_salt) == (-3, "salt")
    assert request.eos_token_ids == [EOS]


def test_lengths_by_default() -> None:
    """OpenAI's completions stop after 16 tokens, chats may fill the context."""
    engine = FakeEngine(max_model_len=100)
    client = make_client(engine)
    client.post(COMPLETIONS, json={"prompt": "ab"})
    client.post(COMPLETIONS, json={"prompt": "ab", "max_tokens": None})
    client.post(CHAT, json={"messages": MESSAGES})
    client.post(CHAT, json={"messages": MESSAGES, "max_completion_tokens": 7})
    num_chat = len(b"<user>Hi</user><assistant>")
    assert [r.sampling.max_tokens for r in engine.submitted] == [16, 98, 100 - num_chat, 7]


def test_stop_reasons() -> None:
    client = make_client(FakeEngine(rule=says("abcdef", step=1)))
    for body, text, reason in (
        ({"stop": "cd"}, "ab", "cd"),
        ({"stop": ["x", "cd"], "include_stop_str_in_output": True}, "abcd", "cd"),
        ({"stop_token_ids": [ord("c")]}, "ab", ord("c")),
        ({}, "abcdef", None),
    ):
        choice = client.post(COMPLETIONS, json={"prompt": "p", **body}).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", reason)


def test_prompt_logprobs() -> None:
    body = {"prompt": "abc", "prompt_logprobs": 1, "max_tokens": 1}
    choice = make_client().post(COMPLETIONS, json=body).json()["choices"][0]
    first, second, third = choice["prompt_logprobs"]
    assert first is None
    assert second[str(ord("b"))] == {"logprob": -0.5, "rank": 2, "decoded_token": "b"}
    assert set(third) == {str(ord("c")), str(ord("d"))}
    reply = (
        make_client().post(CHAT, json={"messages": MESSAGES, "prompt_logprobs": 0, "max_tokens": 1}).json()
    )
    assert len(reply["prompt_logprobs"]) == reply["usage"]["prompt_tokens"]


def test_continue_final_message() -> None:
    engine = FakeEngine()
    messages = [*MESSAGES, {"role": "assistant", "content": "Well"}]
    make_client(engine).post(CHAT, json={"messages": messages, "continue_final_message": True})
    assert bytes(engine.submitted[0].prompt_token_ids) == b"<user>Hi</user><assistant>Well"
    make_client(engine).post(CHAT, json={"messages": MESSAGES, "add_generation_prompt": False})
    assert bytes(engine.submitted[1].prompt_token_ids) == b"<user>Hi</user>"


def test_tokenize_and_detokenize() -> None:
    client = make_client()
    reply = client.post("/tokenize", json={"prompt": "hi", "return_token_strs": True}).json()
    assert reply == {"count": 2, "max_model_len": 512, "tokens": [104, 105], "token_strs": ["h", "i"]}
    chat = client.post("/tokenize", json={"messages": MESSAGES}).json()
    text = client.post("/detokenize", json={"tokens": chat["tokens"]}).json()
    assert text == {"prompt": "<user>Hi</user><assistant>"}
    assert client.post("/tokenize", json={"prompt": ""}).json()["count"] == 0
    assert client.post("/tokenize", json={"prompt": "a" * 40_000}).json()["count"] == 40_000


def test_models() -> None:
    client = make_client()
    cards = client.get("/v1/models").json()
    assert cards["object"] == "list"
    assert [card["id"] for card in cards["data"]] == ["fake", "alias"]
    assert cards["data"][0]["root"] == "fake-model"
    assert cards["data"][0]["max_model_len"] == 512
    assert client.get("/v1/models/alias").json() == cards["data"][1]
    assert client.get("/v1/models/org/other").status_code == 404


def test_queue_full_is_429_with_retry_after() -> None:
    engine = FakeEngine(queue_limit=2)
    client = make_client(engine)
    for stream in (False, True):
        reply = client.post(COMPLETIONS, json={"prompt": "a", "n": 3, "stream": stream})
        assert reply.status_code == 429
        assert reply.headers["retry-after"] == "3"
        assert reply.json()["error"]["type"] == "rate_limit_error"
    assert not engine.running, "the choices that had room were left behind"
    assert client.get("/load").json() == {"server_load": 0}


def test_dead_engine_is_503() -> None:
    engine = FakeEngine()
    client = make_client(engine)
    assert client.get("/health").status_code == 200
    engine.alive = False
    for stream in (False, True):
        reply = client.post(COMPLETIONS, json={"prompt": "a", "stream": stream})
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "engine_dead"
    assert client.get("/health").status_code == 503
    assert client.post("/ping").status_code == 503
    assert client.get("/metrics").status_code == 200
    assert client.get("/v1/models").status_code == 200


def test_engine_that_dies_in_mid_answer() -> None:
    for stream in (False, True):
        engine = FakeEngine()

        def rule(request: Any, done: int, engine: FakeEngine = engine) -> list[int]:
            if done >= 4:
                engine.die()
            return [97, 98]

        engine.rule = rule
        engine.step = _step_until_dead(engine)  # type: ignore[method-assign]
        reply = make_client(engine).post(COMPLETIONS, json={"prompt": "a", "stream": stream})
        if stream:
            events = events_of(reply.text)
            assert [e["choices"][0]["text"] for e in events[:-1]] == ["ab", "ab"]
            assert events[-1]["error"]["code"] == "engine_dead"
        else:
            assert reply.status_code == 503


def _step_until_dead(engine: FakeEngine) -> Any:
    step = FakeEngine.step

    def careful() -> None:
        if any(running.num_tokens >= 4 for running in engine.running.values()):
            engine.die()
        else:
            step(engine)

    return careful


def test_internal_errors_tell_nothing(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()

    def broken(*_: Any) -> None:
        raise RuntimeError(f"secret {object()!r}")

    engine.submit = broken  # type: ignore[method-assign]
    reply = make_client(engine).post(COMPLETIONS, json={"prompt": "a"})
    assert reply.status_code == 500
    error = reply.json()["error"]
    assert error["type"] == "server_error"
    assert "secret" not in reply.text and "0x" not in reply.text
    number = error["message"].split()[-1].rstrip(".")
    assert number in caplog.text and "secret" in caplog.text
