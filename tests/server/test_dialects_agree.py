"""Every dialect tells the same answer, whole and streamed: one neutral stream of events, folded by construction."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from server_fake import END_THINK, EOS, THINK, FakeEngine, events_of, make_client
from starlette.testclient import TestClient

THINKS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{# <think></think> #}"
)
HI: Any = [{"role": "user", "content": "Hi"}]
SCHEMA: Any = {"type": "object", "properties": {}}
FUNCTION: Any = {"name": "f", "description": "x", "parameters": SCHEMA}
Told = tuple[str, str, list[tuple[str, Any]]]  # thoughts, text, calls


def chat(client: TestClient) -> tuple[Told, Told]:
    body = {"messages": HI, "tools": [{"type": "function", "function": FUNCTION}]}
    message = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", [])]
    whole = (message.get("reasoning", ""), message["content"] or "", calls)
    thoughts, text, found = "", "", {}
    for event in events_of(client.post("/v1/chat/completions", json={**body, "stream": True}).text):
        delta = event["choices"][0]["delta"]
        thoughts, text = thoughts + delta.get("reasoning", ""), text + delta.get("content", "")
        for call in delta.get("tool_calls", []):
            name, args = found.get(call["index"], ("", ""))
            function = call["function"]
            found[call["index"]] = (name + function.get("name", ""), args + function.get("arguments", ""))
    return whole, (thoughts, text, list(found.values()))


def anthropic(client: TestClient) -> tuple[Told, Told]:
    tool = {"name": "f", "description": "x", "input_schema": SCHEMA}
    body = {"messages": HI, "tools": [tool], "max_tokens": 4000}
    blocks = client.post("/v1/messages", json=body).json()["content"]

    def told(blocks: list[dict[str, Any]]) -> Told:
        return (
            "".join(b["thinking"] for b in blocks if b["type"] == "thinking"),
            "".join(b["text"] for b in blocks if b["type"] == "text"),
            [(b["name"], b["input"]) for b in blocks if b["type"] == "tool_use"],
        )

    made: list[dict[str, Any]] = []
    for line in client.post("/v1/messages", json={**body, "stream": True}).text.split("\n"):
        event = msgspec.json.decode(line[6:]) if line.startswith("data: ") else {"type": ""}
        if event["type"] == "content_block_start":
            assert event["index"] == len(made)
            made.append({**event["content_block"], "json": ""})
        elif event["type"] == "content_block_delta":
            block, delta = made[event["index"]], event["delta"]
            block["text"] = block.get("text", "") + delta.get("text", "")
            block["thinking"] = block.get("thinking", "") + delta.get("thinking", "")
            block["json"] += delta.get("partial_json", "")
    for block in made:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block["json"])
    return told(blocks), told(made)


def responses(client: TestClient) -> tuple[Told, Told]:
    body = {"input": "Hi", "tools": [{"type": "function", **FUNCTION}]}
    output = client.post("/v1/responses", json=body).json()["output"]

    def told(items: list[dict[str, Any]]) -> Told:
        def texts(kind: str) -> str:
            return "".join(part["text"] for item in items if item["type"] == kind for part in item["content"])

        calls = [(i["name"], i["arguments"]) for i in items if i["type"] == "function_call"]
        return texts("reasoning"), texts("message"), calls

    items: dict[int, dict[str, Any]] = {}
    number = 0
    for line in client.post("/v1/responses", json={**body, "stream": True}).text.split("\n"):
        if not line.startswith("data: "):
            continue
        event = msgspec.json.decode(line[6:])
        assert event["sequence_number"] == number
        number += 1
        kind, place = event["type"], event.get("output_index", -1)
        if kind == "response.output_item.added":
            items[place] = {**event["item"], "content": [{"text": ""}]}
        elif kind.endswith("text.delta"):
            items[place]["content"][0]["text"] += event["delta"]
        elif kind == "response.function_call_arguments.delta":
            items[place]["arguments"] += event["delta"]
        elif kind == "response.completed":
            assert told(event["response"]["output"]) == told(list(items.values()))
    return told(output), told(list(items.values()))


def ollama(client: TestClient) -> tuple[Told, Told]:
    body = {"messages": HI, "tools": [{"type": "function", "function": FUNCTION}]}

    def told(messages: list[dict[str, Any]]) -> Told:
        calls = [c["function"] for m in messages for c in m.get("tool_calls", [])]
        return (
            "".join(m.get("thinking", "") for m in messages),
            "".join(m["content"] for m in messages),
            [(call["name"], call["arguments"]) for call in calls],
        )

    whole = client.post("/api/chat", json={**body, "stream": False}).json()["message"]
    lines = client.post("/api/chat", json=body).text.splitlines()
    return told([whole]), told([json.loads(line)["message"] for line in lines])


# Ollama's lines are cut here as its own client cuts them.
texts = st.text(st.characters(exclude_characters="<", exclude_categories=("Cs",)), max_size=12)
arguments = st.dictionaries(
    st.text(max_size=4), st.none() | st.integers(-99, 99) | st.text(max_size=6), max_size=3
)


@given(
    thoughts=st.none() | texts,
    text=texts,
    calls=st.lists(arguments, max_size=2),
    step=st.integers(1, 9),
)
@settings(max_examples=12, deadline=None)
def test_all_dialects_agree_whole_and_streamed(
    thoughts: str | None, text: str, calls: list[dict[str, Any]], step: int
) -> None:
    written = "".join(
        f'<tool_call>\n{{"name": "f", "arguments": {json.dumps(args)}}}\n</tool_call>\n' for args in calls
    )
    tokens = [] if thoughts is None else [THINK, *thoughts.encode(), END_THINK]
    tokens += [*text.encode(), *written.encode(), EOS]
    engine = FakeEngine(rule=lambda _, done: tokens[done : done + step], max_model_len=8192)
    client = make_client(engine, template=THINKS)
    told = {dialect.__name__: dialect(client) for dialect in (chat, anthropic, responses, ollama)}
    for name, (whole, streamed) in told.items():
        assert whole == streamed, name
    reference = told["chat"][0]
    as_values = [(name, json.loads(args)) for name, args in reference[2]]
    assert [args for _, args in as_values] == calls
    assert told["responses"][0] == reference
    assert told["anthropic"][0] == told["ollama"][0] == (reference[0], reference[1], as_values)
