"""Random schemas x thinking budgets x stop strings x bad words x drafts, through HTTP and the real engine loop; then the
same with strict tools in place of a schema.

The runner draws pseudo-random tokens among those that the masks allow. For every case: an answer that ends by itself fits its
schema, a stream says what the whole reply says, and the usage counts the tokens there were. 4 configurations (drafts or none,
overlap or none) x (150 + 40) cases x (whole reply + stream) = 1,520 answers.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
from server_fake import TEMPLATE, events_of
from starlette.testclient import TestClient
from structured_masked import EOS, masked_core
from tokenizers import AddedToken

from octavo.api.frontend import Frontend
from octavo.api.server.app import build_app
from octavo.api.server.options import ServerSettings
from octavo.api.text.byte_tokenizer import build_byte_tokenizer
from octavo.api.text.template import ChatTemplate
from octavo.api.text.tokenizer import Tokenizer
from octavo.engine.client.inprocess import InProcessClient

CASES, TOOL_CASES = 150, 40  # a configuration; each is one whole reply and one stream
NEEDLESS = [*"ghijkmopvwyzGHIJKLMNOPQRSTUVWXYZ"]  # letters that every schema here can do without
CONFIGURATIONS = [(0, False), (0, True), (3, False), (3, True)]  # drafts, overlap


def schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema that ends: every part is bounded."""
    kind = rng.choice(
        ["integer", "string", "boolean", "enum", "const", "array", "object", "anyOf"][: 5 if depth > 1 else 8]
    )
    if kind == "integer":
        low = rng.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 100)}
    if kind == "string":
        return {"type": "string", "maxLength": rng.randint(0, 6)}
    if kind == "boolean":
        return {"type": "boolean"}
    if kind == "enum":
        return {"enum": rng.sample(["a", "é", 'q"', 1, None, True, "end"], 3)}
    if kind == "const":
        return {"const": rng.choice(["x", 7, None])}
    if kind == "array":
        return {"type": "array", "items": schema(rng, depth + 1), "maxItems": rng.randint(0, 3)}
    if kind == "object":
        names = rng.sample(["a", "b c", "ü", "end"], rng.randint(1, 3))
        return {
            "type": "object",
            "properties": {name: schema(rng, depth + 1) for name in names},
            "required": names[: rng.randint(0, len(names))],
            "additionalProperties": False,
        }
    return {"anyOf": [schema(rng, depth + 1) for _ in range(2)]}


@pytest.fixture(params=CONFIGURATIONS, ids=["plain", "overlap", "drafts", "drafts and overlap"])
def client(request: pytest.FixtureRequest) -> Iterator[TestClient]:
    built = build_byte_tokenizer({"vocab_size": EOS + 1, "eos_token_id": EOS})
    built.backend.add_tokens([AddedToken(text, special=False) for text in ("<think>", "</think>")])
    tokenizer = Tokenizer(built)
    num_drafts, overlap = request.param
    engine = InProcessClient(masked_core(tokenizer, num_drafts=num_drafts, overlap=overlap))
    template = ChatTemplate(TEMPLATE + "{# <think> </think> #}")
    frontend = Frontend(engine, tokenizer, template, model_name="masked")
    with TestClient(
        build_app(frontend, engine, ServerSettings(("masked",)))
    ) as made:  # one event loop for all
        yield made
    asyncio.run(engine.close())


def folded(events: list[dict[str, Any]]) -> dict[str, Any]:
    """A stream as the whole reply would say it."""
    found: dict[str, Any] = {
        "content": "",
        "reasoning": "",
        "calls": [],
        "token_ids": [],
        "finish_reason": None,
        "stop_reason": None,
    }
    for event in events:
        for choice in event["choices"]:
            found["content"] += choice["delta"].get("content") or ""
            found["reasoning"] += choice["delta"].get("reasoning") or ""
            for call in choice["delta"].get("tool_calls") or []:
                if call.get("id"):
                    found["calls"].append([call["function"]["name"], ""])
                found["calls"][call["index"]][1] += call["function"].get("arguments", "")
            found["token_ids"] += choice.get("token_ids") or []
            if choice.get("finish_reason"):
                found["finish_reason"], found["stop_reason"] = (
                    choice["finish_reason"],
                    choice.get("stop_reason"),
                )
    found["usage"] = events[-1]["usage"]
    return found


def whole(reply: dict[str, Any]) -> dict[str, Any]:
    (choice,) = reply["choices"]
    return {
        "content": choice["message"]["content"] or "",
        "reasoning": choice["message"].get("reasoning") or "",
        "calls": [
            [call["function"]["name"], call["function"]["arguments"]]
            for call in choice["message"].get("tool_calls") or []
        ],
        "token_ids": choice["token_ids"],
        "finish_reason": choice["finish_reason"],
        "stop_reason": choice["stop_reason"],
        "usage": reply["usage"],
    }


def both_ways(client: TestClient, body: dict[str, Any]) -> dict[str, Any]:
    """The answer, which is the same whole and streamed, and counted right."""
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, (body, reply.text)
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = client.post("/v1/chat/completions", json={**body, **stream})
    one, other = whole(reply.json()), folded(events_of(streamed.text))
    for cached in (one, other):
        cached["usage"].pop("prompt_tokens_details")
    assert one == other, body
    assert one["usage"]["completion_tokens"] == len(one["token_ids"]) <= body["max_tokens"]
    assert one["usage"]["total_tokens"] == one["usage"]["prompt_tokens"] + len(one["token_ids"])
    return one


def test_answers_fit_streams_agree_and_tokens_are_counted(client: TestClient) -> None:
    rng, outcomes = random.Random(17), Counter[str]()
    for case in range(CASES):
        wanted = schema(rng)
        budget = rng.choice([None, 0, 1, 3, 9])
        stops = rng.choice([None, None, ["end"], ["e", '"'], ["zzz"]])
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": "x" * rng.randint(0, 40)}],
            "seed": case,
            "max_tokens": rng.choice([5, 60, 400, 400]),
            "min_tokens": rng.choice([0, 0, 3]),
            "structured_outputs": {"json": wanted},
            "return_token_ids": True,
            "stop": stops,
            "thinking_token_budget": budget,
            "bad_words": rng.choice([None, None, NEEDLESS]),
        }
        one = both_ways(client, body)
        if body["bad_words"]:
            assert not set(NEEDLESS) & set(one["content"] + one["reasoning"].replace("<think>", ""))
        if budget is not None and "<think>" not in one["content"]:
            assert len(one["reasoning"].encode()) <= budget * len("<think>")  # the longest token there is
        if one["finish_reason"] == "stop" and one["stop_reason"] is None:
            value = json.loads(one["content"])
            assert jsonschema_rs.is_valid(wanted, value), (wanted, value)
            outcomes["whole"] += 1
        elif one["stop_reason"] is not None:
            assert one["stop_reason"] in stops
            assert body["min_tokens"] or one["stop_reason"] not in one["content"]
            outcomes["stop string"] += 1
        else:
            assert one["finish_reason"] == "length" and len(one["token_ids"]) == body["max_tokens"]
            outcomes["length"] += 1
        if one["reasoning"]:
            outcomes["thoughts"] += 1
    # The cases must be of every kind, or agreement proves little.
    assert outcomes["whole"] > CASES // 3 and outcomes["stop string"] > CASES // 20, outcomes


@pytest.mark.parametrize("stream", [False, True])
def test_rules_that_leave_no_token_are_the_client_s_error(client: TestClient, stream: bool) -> None:
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "structured_outputs": {"choice": ["é"]},
        "bad_words": ["é"],  # two bytes: nothing may follow the first
        "stream": stream,
    }
    reply = client.post("/v1/chat/completions", json=body)
    error = events_of(reply.text)[-1]["error"] if stream else reply.json()["error"]
    assert reply.status_code == (200 if stream else 400)
    assert error["type"] == "invalid_request_error" and "No token is left" in error["message"]


def test_strict_tools_under_the_same_rules(client: TestClient) -> None:
    rng, outcomes = random.Random(23), Counter[str]()
    for case in range(TOOL_CASES):
        wanted = {}
        while len(wanted) < 2:
            made = schema(rng)
            if made.get("type") == "object":
                wanted["fg"[len(wanted)]] = made
        tools = [
            {"type": "function", "function": {"name": name, "parameters": made, "strict": True}}
            for name, made in wanted.items()
        ]
        choice = rng.choice(["auto", "required", {"type": "function", "function": {"name": "g"}}])
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": "x" * rng.randint(0, 20)}],
            "seed": case,
            "max_tokens": rng.choice([40, 400, 400]),
            "tools": tools,
            "tool_choice": choice,
            "parallel_tool_calls": rng.choice([None, False]),
            "return_token_ids": True,
            "stop": rng.choice([None, None, ["end"]]),
            "thinking_token_budget": rng.choice([None, 0, 3]),
        }
        one = both_ways(client, body)
        if one["stop_reason"] is not None:  # wherever it appears, in arguments too
            assert one["stop_reason"] in body["stop"]
            outcomes["stop string"] += 1
        elif one["finish_reason"] == "tool_calls":
            for name, arguments in one["calls"]:
                assert jsonschema_rs.is_valid(wanted[name], json.loads(arguments)), (wanted[name], arguments)
            assert len(one["calls"]) == 1 or body["parallel_tool_calls"] is None
            assert isinstance(choice, str) or {name for name, _ in one["calls"]} == {"g"}
            outcomes["calls"] += 1
        elif one["finish_reason"] == "stop":
            assert choice == "auto" and not one["calls"]
            outcomes["text"] += 1
        else:
            outcomes["length"] += 1
    assert outcomes["calls"] > TOOL_CASES // 4 and len(outcomes) >= 3, outcomes
