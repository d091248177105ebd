"""The demo model behind the real server, asked by the real openai client: chat, streams, log probabilities, errors,
a client that leaves, and 64 streams at once that all answer as each would alone."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import openai
import pytest

pytestmark = pytest.mark.model

MODEL = "smollm2:135m"
NUM_STREAMS = 64


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    command = [sys.executable, "-m", "octavo", "serve", MODEL, "--port", "0", "--api-key", "secret"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        if process.stdout is None:
            raise RuntimeError("no standard output")
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        if not found:
            process.kill()
            pytest.fail(f"no URL in {line!r}; {process.communicate()[1][-2000:]}")
        yield found[0]
        assert process.poll() is None, "the server ended during the tests"
    finally:
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == 0


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
        yield client


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def gauge(url: str, name: str) -> float:
    request = urllib.request.Request(f"{url}/metrics", headers={"Authorization": "Bearer secret"})
    with urllib.request.urlopen(request) as reply:
        text = reply.read().decode()
    found = re.search(rf"^octavo:{name}(?:{{[^}}]*}})? ([0-9.e+-]+)$", text, re.MULTILINE)
    assert found, name
    return float(found[1])


def test_chat_and_its_stream_agree(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(messages=ask("Name three colours."), **options)  # type: ignore[call-overload]
    stream = client.chat.completions.create(  # type: ignore[call-overload]
        messages=ask("Name three colours."), stream=True, stream_options={"include_usage": True}, **options
    )
    text, usage = "", None
    for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert len(text) > 10
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert whole.choices[0].finish_reason in ("stop", "length")


def test_completions_with_logprobs_n_and_stop(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model=MODEL, prompt="One, two, three, four,", max_tokens=8, temperature=0, logprobs=3, echo=True
    )
    choice = reply.choices[0]
    assert choice.text.startswith("One, two, three, four,")
    assert "five" in choice.text
    assert choice.logprobs is not None
    values = choice.logprobs.token_logprobs
    assert values is not None
    assert values[0] is None
    assert all(value <= 0 for value in values[1:] if value is not None)
    assert "".join(choice.logprobs.tokens or []) == choice.text
    many = client.completions.create(
        model=MODEL, prompt="The weather today is", max_tokens=12, temperature=1.0, n=4, seed=3
    )
    again = client.completions.create(
        model=MODEL, prompt="The weather today is", max_tokens=12, temperature=1.0, n=4, seed=3
    )
    assert len({choice.text for choice in many.choices}) > 1
    assert [choice.text for choice in many.choices] == [choice.text for choice in again.choices]
    stopped = client.completions.create(
        model=MODEL, prompt="One, two, three, four,", max_tokens=32, temperature=0, stop=[" six"]
    )
    assert " six" not in stopped.choices[0].text
    assert stopped.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("changes", "status", "word"),
    [
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"n": 10**9}, 400, "n"),
        ({"model": "nobody"}, 404, "nobody"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": [10**6]}, 400, "prompt"),
        ({"prompt": [5] * 9000}, 400, "context"),
    ],
)
def test_bad_requests_are_named_and_nothing_dies(
    client: openai.OpenAI, changes: dict[str, object], status: int, word: str
) -> None:
    request = {"model": MODEL, "prompt": "Hello", "max_tokens": 4, **changes}
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**request)  # type: ignore[call-overload]
    assert caught.value.status_code == status
    assert word in str(caught.value)
    assert client.completions.create(model=MODEL, prompt="Hello", max_tokens=2).choices[0].text


def test_a_wrong_key_is_refused(url: str) -> None:
    stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_a_client_that_leaves_frees_its_pages(client: openai.OpenAI, url: str) -> None:
    stream = client.completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    for _ in range(5):
        next(iter(stream))
    assert gauge(url, "num_requests_running") == 1
    stream.close()
    for _ in range(100):
        if gauge(url, "num_requests_running") == 0 and gauge(url, "kv_cache_usage_perc") == 0:
            return
        time.sleep(0.05)
    pytest.fail("the abandoned request still runs or holds pages")


def test_64_streams_answer_as_each_alone(url: str) -> None:
    prompts = [f"Item {i}: the number {i * 37} is" for i in range(NUM_STREAMS)]

    async def one(client: openai.AsyncOpenAI, prompt: str) -> str:
        text = ""
        stream = await client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=16, temperature=0, stream=True
        )
        async for chunk in stream:
            text += "".join(choice.text for choice in chunk.choices)
        return text

    async def both() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
            together = await asyncio.gather(*(one(client, prompt) for prompt in prompts))
            alone = [await one(client, prompt) for prompt in prompts]
        return together, alone

    together, alone = asyncio.run(both())
    assert together == alone
    assert len(set(together)) > NUM_STREAMS // 2
