"""The demo model behind the real server, asked by the real packages of three vendors: the same greedy answer in every
dialect, whole and streamed, tools that must be called, JSON that must be JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import anthropic
import ollama
import openai
import pytest

pytestmark = pytest.mark.model

MODEL = "smollm2:135m"
HI: Any = [{"role": "user", "content": "Name three colours."}]
WEATHER: Any = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    command = [sys.executable, "-m", "octavo", "serve", MODEL, "--port", "0", "--api-key", "secret"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
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


@pytest.fixture(scope="module")
def openai_client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="secret", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def local(url: str) -> Iterator[ollama.Client]:
    with ollama.Client(host=url, headers={"Authorization": "Bearer secret"}) as client:
        yield client


@pytest.fixture(scope="module")
def answer(openai_client: openai.OpenAI) -> str:
    """What the model says at temperature 0, in 24 tokens."""
    reply = openai_client.chat.completions.create(model=MODEL, messages=HI, temperature=0, max_tokens=24)
    assert reply.choices[0].message.content
    return reply.choices[0].message.content


def test_responses(openai_client: openai.OpenAI, answer: str) -> None:
    reply = openai_client.responses.create(
        model=MODEL, input=HI[0]["content"], temperature=0, max_output_tokens=24
    )
    assert reply.output_text == answer and reply.usage is not None
    with openai_client.responses.stream(
        model=MODEL, input=HI[0]["content"], temperature=0, max_output_tokens=24
    ) as stream:
        assert (
            "".join(event.delta for event in stream if event.type == "response.output_text.delta") == answer
        )
    following = openai_client.responses.create(
        model=MODEL, input="And one more?", previous_response_id=reply.id, max_output_tokens=8
    )
    assert following.usage is not None and following.usage.input_tokens > reply.usage.input_tokens


def test_anthropic(claude: anthropic.Anthropic, answer: str) -> None:
    asked: Any = {"model": MODEL, "max_tokens": 24, "messages": HI, "extra_body": {"temperature": 0}}
    reply = claude.messages.create(**asked)
    assert reply.content[0].type == "text" and reply.content[0].text == answer
    with claude.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == answer
    counted = claude.messages.count_tokens(model=MODEL, messages=HI)
    cached = reply.usage.cache_read_input_tokens or 0
    assert counted.input_tokens == reply.usage.input_tokens + cached


def test_ollama(local: ollama.Client, answer: str) -> None:
    options: Any = {"temperature": 0, "num_predict": 24}
    reply = local.chat(MODEL, HI, options=options)
    assert reply.message.content == answer and reply.eval_count == 24
    assert (
        "".join(p.message.content or "" for p in local.chat(MODEL, HI, options=options, stream=True))
        == answer
    )
    assert local.generate(MODEL, HI[0]["content"], options=options).response == answer
    assert local.list().models[0].model == MODEL
    assert "completion" in (local.show(MODEL).capabilities or [])


def test_a_tool_that_must_be_called(
    openai_client: openai.OpenAI, claude: anthropic.Anthropic, local: ollama.Client
) -> None:
    ask: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    function: Any = {"name": "weather", "description": "Tells the weather", "parameters": WEATHER}
    stream = openai_client.chat.completions.create(
        model=MODEL,
        messages=ask,
        tools=[{"type": "function", "function": function}],
        tool_choice="required",
        max_tokens=80,
        temperature=0,
        stream=True,
    )
    calls = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or []]
    arguments = "".join(call.function.arguments or "" for call in calls if call.function)
    assert isinstance(json.loads(arguments)["city"], str)
    reply = claude.messages.create(
        model=MODEL,
        max_tokens=80,
        messages=ask,
        tools=[{"name": "weather", "description": "Tells the weather", "input_schema": WEATHER}],
        tool_choice={"type": "any"},
        extra_body={"temperature": 0},
    )
    assert reply.stop_reason == "tool_use" and reply.content[-1].type == "tool_use"
    assert reply.content[-1].input == json.loads(arguments)
    made = openai_client.responses.create(
        model=MODEL,
        input=ask,
        tools=[{"type": "function", "strict": None, **function}],
        tool_choice="required",
        max_output_tokens=80,
        temperature=0,
    )
    assert made.output[-1].type == "function_call"
    assert json.loads(made.output[-1].arguments) == json.loads(arguments)


def test_json(openai_client: openai.OpenAI, claude: anthropic.Anthropic, local: ollama.Client) -> None:
    reply = local.chat(MODEL, HI, format=WEATHER, options={"num_predict": 60, "temperature": 0})
    assert set(json.loads(reply.message.content or "")) >= {"city"}
    form: Any = {"type": "json_schema", "name": "w", "schema": WEATHER}
    made = openai_client.responses.create(
        model=MODEL, input="Where?", text={"format": form}, max_output_tokens=60, temperature=0
    )
    assert isinstance(json.loads(made.output_text)["city"], str)
    said = claude.messages.create(
        model=MODEL,
        max_tokens=60,
        messages=HI,
        output_config={"format": {"type": "json_schema", "schema": WEATHER}},
        extra_body={"temperature": 0},
    )
    assert said.content[0].type == "text" and isinstance(json.loads(said.content[0].text)["city"], str)


def test_langchain(url: str, answer: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(
        model=MODEL, base_url=f"{url}/v1", api_key="secret", temperature=0, max_tokens=24, max_retries=0
    )
    assert model.invoke(HI[0]["content"]).content == answer


def test_embeddings_are_refused_with_the_cure(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="--runner pooling"):
        openai_client.embeddings.create(model=MODEL, input="x")
