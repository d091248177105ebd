"""The Responses API through the real ``openai`` package, and a scripted engine behind it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from server_fake import (
    END_THINK,
    EOS,
    THINK,
    FakeEngine,
    Live,
    eventually,
    for_ever,
    live_server,
    make_client,
    make_tokenizer,
    says,
)

from octavo.api.openai.responses.schema import Reasoning, Response, TextConfig
from octavo.api.openai.responses.store import Kept, ResponseNotFoundError, ResponseStore, StoreLimits
from octavo.errors import QueueFullError
from octavo.protocol.generate import TokenDelta

TEXT = "Hello, wörld 🎉! How are you?"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>'
ARGS = '{"city": "Köln", "days": 2}'
TOOLS: Any = [
    {
        "type": "function",
        "name": "weather",
        "description": "Tells it",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": None,
    }
]
THINKS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{# <think></think> #}"
)


@contextmanager
def speaking(
    rule: Any, template: str | None = None, key: str = "a", paused: bool = False, **settings: Any
) -> Iterator[tuple[Live, openai.OpenAI]]:
    engine = FakeEngine(rule=rule, paused=paused, max_model_len=settings.pop("max_model_len", 4096))
    given = {**settings, **({"template": template} if template else {})}
    with (
        live_server(engine, **given) as live,
        openai.OpenAI(base_url=live.url, api_key=key, max_retries=0, timeout=20) as client,
    ):
        yield live, client


def prompt_of(live: Live) -> str:
    ids = live.engine.submitted[-1].prompt_token_ids
    return make_tokenizer().decode(ids, skip_special_tokens=False)


def test_text_whole_and_streamed() -> None:
    with speaking(says(TEXT)) as (_, client):
        reply = client.responses.create(
            model="fake", input="Hi", instructions="Be kind", temperature=0.5, metadata={"a": "b"}
        )
        assert reply.output_text == TEXT and reply.status == "completed" and reply.metadata == {"a": "b"}
        assert reply.usage is not None and reply.usage.output_tokens == len(TEXT.encode()) + 1
        assert reply.usage.input_tokens_details.cached_tokens == 2 and reply.temperature == 0.5
        with client.responses.stream(model="fake", input="Hi") as stream:
            events = list(stream)
            final = stream.get_final_response()
        assert final.output_text == TEXT
        kinds = [event.type for event in events]
        assert kinds[:4] == [
            *("response.created", "response.in_progress", "response.output_item.added"),
            "response.content_part.added",
        ]
        assert kinds[-4:] == [
            *("response.output_text.done", "response.content_part.done"),
            *("response.output_item.done", "response.completed"),
        ]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == TEXT


def test_a_conversation_goes_on_by_id_and_by_items() -> None:
    with speaking(says("ok")) as (live, client):
        first = client.responses.create(model="fake", input="one", instructions="S")
        second = client.responses.create(model="fake", input="two", previous_response_id=first.id)
        assert prompt_of(live) == "<user>one</user><assistant>ok</assistant><user>two</user><assistant>"
        client.responses.create(model="fake", input="three", previous_response_id=second.id)
        assert prompt_of(live).count("<assistant>ok</assistant>") == 2
        items: Any = [
            {"role": "developer", "content": "S"},
            {"role": "user", "content": [{"type": "input_text", "text": "one"}]},
            *[item.model_dump() for item in first.output],
            {"role": "user", "content": "two"},
        ]
        client.responses.create(model="fake", input=items)
        expected = "<system>S</system><user>one</user><assistant>ok</assistant><user>two</user><assistant>"
        assert prompt_of(live) == expected


def test_kept_responses() -> None:
    with speaking(says("ok")) as (_, client):
        made = client.responses.create(
            model="fake", input=[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
        )
        assert client.responses.retrieve(made.id).output_text == "ok"
        listed = client.responses.input_items.list(made.id, order="asc", limit=1)
        assert listed.data[0].content == "a" and listed.has_more  # type: ignore[union-attr]
        assert [item.content for item in client.responses.input_items.list(made.id)] == ["b", "a"]  # type: ignore[union-attr]
        client.responses.delete(made.id)
        for ask in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
            with pytest.raises(openai.NotFoundError):
                ask(made.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.create(model="fake", input="x", previous_response_id=made.id)
        unkept = client.responses.create(model="fake", input="x", store=False)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(unkept.id)


def test_another_key_sees_nothing_of_it() -> None:
    with speaking(says("ok"), key="one", api_keys=("one", "two")) as (live, client):
        made = client.responses.create(model="fake", input="secret")
        with openai.OpenAI(base_url=live.url, api_key="two", max_retries=0) as other:
            for ask in (other.responses.retrieve, other.responses.delete):
                with pytest.raises(openai.NotFoundError):
                    ask(made.id)
            with pytest.raises(openai.NotFoundError):
                other.responses.create(model="fake", input="x", previous_response_id=made.id)
        assert client.responses.retrieve(made.id).id == made.id


def test_tools_whole_and_streamed() -> None:
    said = f"Let me see.\n{CALL}\n{CALL.replace('Köln', 'Bonn')}"
    with speaking(says(said)) as (live, client):
        reply = client.responses.create(model="fake", input="Hi", tools=TOOLS)
        assert [item.type for item in reply.output] == ["message", "function_call", "function_call"]
        calls = [item for item in reply.output if item.type == "function_call"]
        assert [call.arguments for call in calls] == [ARGS, ARGS.replace("Köln", "Bonn")]
        stream = client.responses.create(model="fake", input="Hi", tools=TOOLS, stream=True)
        events = list(stream)
        deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
        assert len(deltas) > 8
        for place, call in enumerate(calls, 1):
            assert "".join(event.delta for event in deltas if event.output_index == place) == call.arguments
        assert events[-1].type == "response.completed"
        told = [item.type for item in events[-1].response.output]
        assert told == ["message", "function_call", "function_call"]
        answer: Any = [{"type": "function_call_output", "call_id": calls[0].call_id, "output": "sunny"}]
        client.responses.create(model="fake", input=answer, previous_response_id=reply.id, tools=TOOLS)
        prompt = prompt_of(live)
        assert (
            prompt.count("<tool_call>\n{") == 3 and "<tool_response>\nsunny" in prompt
        )  # one explains the form


@pytest.mark.parametrize(
    ("choice", "grammar", "offered"),
    [
        ("auto", False, True),
        ("none", False, False),
        ("required", True, True),
        ({"type": "function", "name": "weather"}, True, True),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "weather"}],
            },
            True,
            True,
        ),
    ],
)
def test_tool_choice(choice: Any, grammar: bool, offered: bool) -> None:
    tools = [*TOOLS, {**TOOLS[0], "name": "time"}]
    with speaking(says(CALL)) as (live, client):
        client.responses.create(model="fake", input="Hi", tools=tools, tool_choice=choice)
        assert (live.engine.submitted[-1].grammar is not None) == grammar
        assert ("weather" in prompt_of(live)) == offered
        if isinstance(choice, dict) and choice["type"] == "allowed_tools":
            assert "time" not in prompt_of(live)


def test_reasoning() -> None:
    tokens = [THINK, *b"let me think", END_THINK, *b"42", EOS]
    with speaking(lambda request, done: tokens[done : done + 1], THINKS) as (live, client):
        reply = client.responses.create(model="fake", input="Hi", reasoning={"effort": "low"})
        assert [item.type for item in reply.output] == ["reasoning", "message"]
        first = reply.output[0]
        assert first.type == "reasoning" and first.content and first.content[0].text == "let me think"
        assert reply.output_text == "42" and reply.usage is not None
        assert reply.usage.output_tokens_details.reasoning_tokens == len(b"let me think") + 2
        watched = live.engine.submitted[-1].thinking
        assert watched is not None and watched.budget == 1024
        events = list(client.responses.create(model="fake", input="Hi", stream=True))
        assert "".join(e.delta for e in events if e.type == "response.reasoning_text.delta") == "let me think"
        following: Any = [*[item.model_dump() for item in reply.output], {"role": "user", "content": "x"}]
        client.responses.create(model="fake", input=following)
        client.responses.create(model="fake", input="Hi", extra_body={"thinking_token_budget": 7})
        watched = live.engine.submitted[-1].thinking
        assert watched is not None and watched.budget == 7


def test_formats_and_length() -> None:
    with speaking(says('{"a": 1}')) as (live, client):
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        forms: Any = [{"type": "json_object"}, {"type": "json_schema", "name": "n", "schema": schema}]
        for form in forms:
            reply = client.responses.create(model="fake", input="Hi", text={"format": form})
            assert live.engine.submitted[-1].grammar is not None and reply.text is not None
        short = client.responses.create(model="fake", input="Hi", max_output_tokens=3)
        assert short.status == "incomplete" and short.incomplete_details is not None
        assert short.incomplete_details.reason == "max_output_tokens"
        last = list(client.responses.create(model="fake", input="Hi", max_output_tokens=3, stream=True))[-1]
        assert last.type == "response.incomplete"


def test_truncation() -> None:
    with speaking(says("ok"), max_model_len=120) as (live, client):
        items: Any = [{"role": "user", "content": f"{i} " + "x" * 20} for i in range(6)]
        with pytest.raises(openai.BadRequestError, match="context"):
            client.responses.create(model="fake", input=items)
        client.responses.create(model="fake", input=items, instructions="S", truncation="auto")
        prompt = prompt_of(live)
        assert prompt.startswith("<system>S</system><user>") and "5 xx" in prompt and "0 xx" not in prompt
        assert len(prompt) < 120


def test_count() -> None:
    with speaking(says("ok")) as (live, client):
        counted = client.responses.input_tokens.count(model="fake", input="Hi", instructions="S", tools=TOOLS)
        assert not live.engine.submitted
        client.responses.create(model="fake", input="Hi", instructions="S", tools=TOOLS)
        assert counted.input_tokens == len(live.engine.submitted[-1].prompt_token_ids)


def test_background() -> None:
    with speaking(says("ok")) as (live, client):
        live.engine.paused = True
        made = client.responses.create(model="fake", input="Hi", background=True)
        assert made.status == "queued" and not made.output
        live.engine.paused = False
        done = client.responses.create(model="fake", input="Hi")  # wakes the engine
        assert done.status == "completed"
        assert wait_for(client, made.id) == "completed"
        assert client.responses.retrieve(made.id).output_text == "ok"
        assert client.responses.cancel(made.id).status == "completed"
        with pytest.raises(openai.BadRequestError, match="background"):
            client.responses.cancel(done.id)


def test_background_is_cancelled_deleted_and_fails_alone() -> None:
    # The engine makes no step: even an answer without end has one, that of the context, and soon.
    with speaking(for_ever, paused=True) as (live, client):
        engine = live.engine
        made = client.responses.create(model="fake", input="Hi", background=True)
        eventually(lambda: bool(engine.running))
        assert client.responses.cancel(made.id).status == "cancelled"
        assert client.responses.retrieve(made.id).status == "cancelled" and live.engine.aborted
        with pytest.raises(openai.BadRequestError, match="cancelled"):
            client.responses.create(model="fake", input="Hi", previous_response_id=made.id)
        made = client.responses.create(model="fake", input="Hi", background=True)
        client.responses.delete(made.id)  # one that has not come to the engine by now never does
        eventually(lambda: len(engine.aborted) == len(engine.submitted) and not engine.running)
        made = client.responses.create(model="fake", input="Hi", background=True)
        eventually(lambda: bool(engine.running))

        def fail() -> None:
            for running in list(live.engine.running.values()):
                del live.engine.running[running.request.id]
                running.sink(TokenDelta(running.request.id, [], "error", error="This one failed."))

        live.call(fail)
        assert wait_for(client, made.id) == "failed"
        failed = client.responses.retrieve(made.id)
        assert failed.error is not None and failed.error.code == "server_error"


def test_what_runs_in_the_background_is_bounded_for_each_key() -> None:
    store = ResponseStore(StoreLimits(running=2))
    for i in range(2):
        made = response(f"r{i}")
        made.stop = lambda: None
        store.check_running("a")
        store.put("a", made)
    store.check_running("b")
    with pytest.raises(QueueFullError):
        store.check_running("a")
    stopped: list[str] = []
    store.get("a", "r0").stop = lambda: stopped.append("r0")
    store.put("a", response("r0"))  # the same id again
    assert stopped == ["r0"]
    store.check_running("a")


def wait_for(client: openai.OpenAI, response_id: str) -> str:
    for _ in range(200):
        status = client.responses.retrieve(response_id).status
        if status not in ("queued", "in_progress"):
            return status or ""
        time.sleep(0.02)
    raise TimeoutError(response_id)


def test_an_engine_that_dies_fails_the_stream() -> None:
    with speaking(lambda request, done: [97]) as (live, client):
        kinds = []
        for i, event in enumerate(client.responses.create(model="fake", input="Hi", stream=True)):
            kinds.append(event.type)
            if i == 5:
                live.call(live.engine.die)
        assert kinds[-1] == "response.failed"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "computer_call_output"}]}, "input[0].type is 'computer_call_output'"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "function_call", "call_id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "only text"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"background": True, "store": False}, "background"),
        ({"background": True, "stream": True}, "background"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"metadata": {"a": 1}}, "metadata"),
    ],
)
def test_errors_name_the_field(change: dict[str, Any], words: str) -> None:
    reply = make_client().post("/v1/responses", json={"input": "Hi", **change})
    assert reply.status_code == 400, reply.text
    assert words in json.dumps(reply.json()["error"]["message"]).replace('\\"', '"')


def response(response_id: str, metadata: dict[str, str] | None = None) -> Kept:
    made = Response(
        id=response_id,
        created_at=0,
        status="completed",
        model="m",
        reasoning=Reasoning(),
        temperature=1.0,
        text=TextConfig(),
        top_p=1.0,
        metadata=metadata or {},
    )
    return Kept(made, [])


def test_the_store_is_bounded_for_each_key() -> None:
    now = [0.0]
    store = ResponseStore(StoreLimits(entries=3, nbytes=4000, seconds=10), clock=lambda: now[0])
    for i in range(5):
        store.put("a", response(f"a{i}"))
    store.put("b", response("b0"))
    assert len(store) == 4 and store.get("a", "a4") and store.get("b", "b0")
    for gone in ("a0", "a1", "b0"):
        with pytest.raises(ResponseNotFoundError):
            store.get("a", gone)
    stopped = []
    big = response("big", {"x": "y" * 3000})
    big.stop = lambda: stopped.append("big")
    store.put("a", big)
    with pytest.raises(ResponseNotFoundError):
        store.get("a", "a4")  # it had to make room
    store.put("a", response("big2", {"x": "y" * 3000}))
    assert stopped == ["big"] and len(store) == 2
    store.put("a", response("huge", {"x": "y" * 5000}))
    assert len(store) == 1  # too large to keep, and nothing else is left of that key
    now[0] = 11.0
    with pytest.raises(ResponseNotFoundError):
        store.get("b", "b0")
    assert len(store) == 0
    nothing = ResponseStore(StoreLimits(entries=0))
    nothing.put("a", response("a0"))
    assert len(nothing) == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tools", [False, True])
def test_log_probabilities_of_texts(stream: bool, tools: bool) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    text = "So. "
    engine = FakeEngine(rule=says(text + call if tools else text), max_model_len=4096)
    body: dict[str, Any] = {"input": "Hi", "top_logprobs": 2, "stream": stream}
    if tools:
        body["tools"] = [{"type": "function", "name": "f"}]
    reply = make_client(engine).post("/v1/responses", json=body)
    assert reply.status_code == 200, reply.text
    if stream:
        told = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
        pieces = [piece for event in told for piece in event.get("logprobs", []) if "delta" in event]
        made = told[-1]["response"]
        done = next(event for event in told if event["type"] == "response.output_text.done")
        assert done["logprobs"] == pieces == made["output"][0]["content"][0]["logprobs"]
    else:
        made = reply.json()
    (part,) = made["output"][0]["content"]
    rows = part["logprobs"]
    assert "".join(row["token"] for row in rows).startswith(part["text"]) and made["top_logprobs"] == 2
    assert all(len(row["top_logprobs"]) == 2 and row["logprob"] == -0.5 for row in rows)
    plain = make_client(FakeEngine(rule=says(text))).post("/v1/responses", json={"input": "Hi"}).json()
    assert plain["output"][0]["content"][0]["logprobs"] == []
    asked = {"input": "Hi", "include": ["message.output_text.logprobs"]}
    some = make_client(FakeEngine(rule=says(text))).post("/v1/responses", json=asked).json()
    assert [row["top_logprobs"] for row in some["output"][0]["content"][0]["logprobs"]] == [[]] * 5


def test_thoughts_have_no_log_probabilities() -> None:
    tokens = [THINK, *b"hm", END_THINK, *b"42", EOS]
    engine = FakeEngine(rule=lambda _, done: tokens[done : done + 1])
    reply = make_client(engine, template=THINKS).post(
        "/v1/responses", json={"input": "Hi", "top_logprobs": 1}
    )
    message = reply.json()["output"][-1]["content"][0]
    assert message["text"] == "42" and [row["token"] for row in message["logprobs"]] == ["4", "2"]
