"""The real ``openai`` package against a real socket: what users do on the first day."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from server_fake import FakeEngine, Live, for_ever, live_server, says

TEXT = "Hello, wörld 🎉! How are you?"
MESSAGES: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server(FakeEngine(rule=says(TEXT)), api_keys=("sk-right",)) as server:
        yield server


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url, api_key="sk-right", max_retries=0, timeout=20) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake", "alias"]
    assert client.models.retrieve("alias").owned_by == "octavo"


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="fake", messages=MESSAGES, temperature=0)
    assert reply.choices[0].message.content == TEXT
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 2
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.id.startswith("chatcmpl-")


def test_a_reply_can_be_sent_back(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="fake", messages=MESSAGES)
    said: Any = reply.choices[0].message.model_dump()
    again = client.chat.completions.create(model="fake", messages=[*MESSAGES, said, *MESSAGES])
    assert again.choices[0].message.content == TEXT


def test_chat_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="fake", messages=MESSAGES, stream=True, n=2, stream_options={"include_usage": True}
        )
    )
    for index in range(2):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine) == TEXT
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["stop"]
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens == 2 * (len(TEXT.encode()) + 1)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="fake", messages=MESSAGES, logprobs=True) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == TEXT
    assert final.choices[0].logprobs is not None and final.choices[0].logprobs.content is not None
    assert len(final.choices[0].logprobs.content) == len(TEXT.encode()) + 1


def test_chat_logprobs(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="fake", messages=MESSAGES, logprobs=True, top_logprobs=2, max_completion_tokens=3
    )
    assert reply.choices[0].finish_reason == "length"
    assert reply.choices[0].logprobs is not None and reply.choices[0].logprobs.content is not None
    first = reply.choices[0].logprobs.content[0]
    assert (first.token, first.logprob, first.bytes) == ("H", -0.5, [72])
    assert [top.logprob for top in first.top_logprobs] == [-0.25, -0.5]


def test_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="fake", prompt=["ab", "c"], n=2, echo=True, max_tokens=3, logprobs=1, stop=["zz"]
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in reply.choices] == ["abHel", "abHel", "cHel", "cHel"]
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens == ["a", "b", "H", "e", "l"]
    assert logprobs.text_offset == [0, 1, 2, 3, 4]


def test_completions_of_token_ids_as_a_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="fake", prompt=[97, 98], stream=True, max_tokens=40, extra_body={"return_token_ids": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT
    ids = [i for chunk in chunks for i in chunk.choices[0].model_extra["token_ids"]]  # type: ignore[index]
    assert bytes(ids[:-1]).decode() == TEXT


def test_errors_become_the_right_exceptions(client: openai.OpenAI, live: Live) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="fake", messages=MESSAGES, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model="fake",
            messages=MESSAGES,
            tools=[{"type": "function", "function": {"name": "", "parameters": {}}}],
        )
    assert tools.value.param == "tools[0].function.name"
    with (
        openai.OpenAI(base_url=live.url, api_key="sk-wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_full_queue_is_a_rate_limit() -> None:
    with (
        live_server(FakeEngine(queue_limit=0)) as live,
        openai.OpenAI(base_url=live.url, api_key="x", max_retries=0) as client,
    ):
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(model="fake", prompt="a", stream=True)
        assert full.value.response.headers["retry-after"] == "3"


def test_error_in_mid_stream_is_raised() -> None:
    engine = FakeEngine(rule=for_ever, paused=True)
    with (
        live_server(engine, sse_heartbeat_s=0.05) as live,
        openai.OpenAI(base_url=live.url, api_key="x", max_retries=0, timeout=20) as client,
    ):
        stream = client.completions.create(model="fake", prompt="a", stream=True, max_tokens=100)
        live.call(engine.step)
        assert next(stream).choices[0].text == "a"
        live.call(engine.die)
        with pytest.raises(openai.APIError, match="engine"):
            next(stream)


def test_closing_a_stream_frees_the_request() -> None:
    engine = FakeEngine(rule=for_ever, paused=True)
    with (
        live_server(engine, sse_heartbeat_s=0.05) as live,
        openai.OpenAI(base_url=live.url, api_key="x", max_retries=0, timeout=20) as client,
    ):
        stream = client.completions.create(model="fake", prompt="a", stream=True, max_tokens=100)
        live.call(engine.step)
        next(stream)
        stream.close()
        for _ in range(1000):
            if not engine.running:
                break
            live.call(lambda: None)
        assert engine.aborted == [engine.submitted[0].id]


def test_async_client_with_many_streams(live: Live) -> None:
    async def one(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def many() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=live.url, api_key="sk-right", max_retries=0, timeout=30
        ) as client:
            return await asyncio.gather(*(one(client) for _ in range(32)))

    assert asyncio.run(many()) == [TEXT] * 32
