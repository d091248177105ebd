"""Thoughts split from answers, budgets handed to the engine, and both together with tools and schemas."""

from __future__ import annotations

import itertools
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_fake import (
    END_THINK,
    EOS,
    THINK,
    FakeEngine,
    Rule,
    events_of,
    live_server,
    make_client,
    make_tokenizer,
    says,
)

from octavo.api.chat.events import Reasoning
from octavo.api.chat.formats.reasoning import MARKERS, ReasoningParser, detect_thinking
from octavo.api.chat.thinking import PromptThoughts, ThinkingFormat, prompt_thoughts
from octavo.protocol.generate import GenerateRequest, Thinking

CHAT = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
THINKS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if '</think>' in m.content %}{% endif %}</{{ m.role }}>"
    "{% endfor %}<assistant>{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
OPENS = THINKS + "{{ '<think>\\n' }}"
TOOLS: Any = [{"type": "function", "function": {"name": "f"}}]
CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


def thinks(text: str, step: int = 3) -> Rule:
    """Like ``says``, with the markers as tokens."""
    tokens: list[int] = []
    for part in text.replace("</think>", "\0</think>\0").replace("<think>", "\0<think>\0").split("\0"):
        tokens += {"<think>": [THINK], "</think>": [END_THINK]}.get(part, list(part.encode()))
    tokens.append(EOS)
    return lambda request, done: tokens[done : done + step] or [ord(".")]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    ("template", "text", "reasoning", "content"),
    [
        (THINKS, "<think>\nHm, so.\n</think>\n\nYes.", "Hm, so.", "Yes."),
        (THINKS, "Yes.", None, "Yes."),
        (THINKS, "<think>\n\n</think>\n\nYes.", None, "Yes."),
        (THINKS, "<think>never ends", "never ends", None),
        (THINKS, "Yes <think>no</think>", None, "Yes <think>no</think>"),
        (OPENS, "Hm, so.\n</think>\n\nYes.", "Hm, so.", "Yes."),
        (OPENS, "<think>Hm</think>Yes.", "Hm", "Yes."),
        (OPENS, "Hm", "Hm", None),
    ],
)
def test_split(special: bool, template: str, text: str, reasoning: str | None, content: str | None) -> None:
    client = make_client(
        FakeEngine(rule=thinks(text)), template=template, tokenizer=make_tokenizer(special=special)
    )
    message = client.post(CHAT, json={"messages": MESSAGES}).json()["choices"][0]["message"]
    assert message["content"] == content
    assert message.get("reasoning") == reasoning == message.get("reasoning_content")
    events = events_of(client.post(CHAT, json={"messages": MESSAGES, "stream": True}).text)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == (content or "")
    assert "".join(delta.get("reasoning", "") for delta in deltas) == (reasoning or "")
    assert all(delta.get("reasoning") == delta.get("reasoning_content") for delta in deltas)
    hidden = client.post(CHAT, json={"messages": MESSAGES, "include_reasoning": False}).json()
    assert "reasoning" not in hidden["choices"][0]["message"]
    assert (hidden["choices"][0]["message"]["content"] or "") == (content or "")


def test_switched_off_thoughts_and_other_models() -> None:
    client = make_client(FakeEngine(rule=says("a <think> b")), template=THINKS)
    body = {"messages": MESSAGES, "chat_template_kwargs": {"enable_thinking": False}}
    message = client.post(CHAT, json=body).json()["choices"][0]["message"]
    assert message["content"] == "a <think> b" and "reasoning" not in message
    plain = make_client(FakeEngine(rule=says("<think>a</think>b")))
    assert (
        plain.post(CHAT, json={"messages": MESSAGES}).json()["choices"][0]["message"]["content"]
        == "<think>a</think>b"
    )


@pytest.mark.parametrize(
    ("template", "fields", "expected"),
    [
        (THINKS, {}, None),
        (THINKS, {"thinking_token_budget": -1}, None),
        (THINKS, {"thinking_token_budget": 0}, Thinking(start_id=THINK, end_id=END_THINK, budget=0)),
        (
            OPENS,
            {"thinking_token_budget": 7},
            Thinking(start_id=THINK, end_id=END_THINK, budget=7, num_prompt_tokens=1),
        ),
        (
            OPENS,
            {"response_format": {"type": "json_object"}},
            Thinking(start_id=THINK, end_id=END_THINK, num_prompt_tokens=1),
        ),
        (THINKS, {"thinking_token_budget": 7, "chat_template_kwargs": {"enable_thinking": False}}, None),
    ],
)
def test_what_the_engine_watches(template: str, fields: dict[str, Any], expected: Thinking | None) -> None:
    engine = FakeEngine()
    reply = make_client(engine, template=template).post(CHAT, json={"messages": MESSAGES, **fields, "n": 2})
    assert reply.status_code == 200, reply.text
    assert [request.thinking for request in engine.submitted] == [expected, expected]


@pytest.mark.parametrize("budget", [-2, 2**31, 1.5, "x"])
def test_bad_budgets(budget: Any) -> None:
    reply = make_client(template=THINKS).post(
        CHAT, json={"messages": MESSAGES, "thinking_token_budget": budget}
    )
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "thinking_token_budget"


def test_a_budget_needs_a_model_that_thinks() -> None:
    body = {"messages": MESSAGES, "thinking_token_budget": 5}
    error = make_client().post(CHAT, json=body).json()["error"]
    assert error["param"] == "thinking_token_budget" and "markers" in error["message"]
    spelled = (
        THINKS.replace("think>", "thoughts>")
        .replace("<thoughts>", "[THINK]")
        .replace("</thoughts>", "[/THINK]")
    )
    error = make_client(template=spelled).post(CHAT, json=body).json()["error"]
    assert error["param"] == "thinking_token_budget" and "one token" in error["message"]
    assert make_client().post(CHAT, json={**body, "thinking_token_budget": -1}).status_code == 200


def test_thoughts_already_in_the_prompt_are_counted() -> None:
    tokenizer = make_tokenizer()
    format = ThinkingFormat(MARKERS[0], (THINK, END_THINK), False)

    def thoughts(text: str) -> PromptThoughts:
        return prompt_thoughts(tokenizer.encode(text, False), format, tokenizer)

    assert thoughts("abc") == PromptThoughts()
    assert thoughts("abc<think>") == PromptThoughts(num_tokens=0)
    assert thoughts("abc<think>\nhm") == PromptThoughts(num_tokens=3)
    assert thoughts("<think>a</think>") == PromptThoughts(closed=True)
    spelled = ThinkingFormat(MARKERS[0], None, False)
    assert prompt_thoughts(list(b"x<think>\n"), spelled, tokenizer) == PromptThoughts(num_tokens=0)
    assert prompt_thoughts(list(b"x</think>\n"), spelled, tokenizer) == PromptThoughts(closed=True)
    special = make_tokenizer(special=True)
    assert prompt_thoughts(special.encode("<think>a", False), format, special) == PromptThoughts(num_tokens=1)


def test_thoughts_then_a_tool_call_with_the_openai_client() -> None:
    engine = FakeEngine(rule=thinks(f"<think>I call f.</think>\n\n{CALL}"), max_model_len=2048)
    with (
        live_server(engine, template=THINKS) as live,
        openai.OpenAI(base_url=live.url, api_key="x", max_retries=0, timeout=20) as client,
    ):
        reply = client.chat.completions.create(
            model="fake",
            messages=MESSAGES,
            tools=TOOLS,
            tool_choice="required",
            extra_body={"thinking_token_budget": 50},
        )
        message: Any = reply.choices[0].message
        assert message.reasoning == "I call f." and message.content is None
        assert message.tool_calls[0].function.name == "f" and reply.choices[0].finish_reason == "tool_calls"
        sent: GenerateRequest = engine.submitted[0]
        assert sent.thinking == Thinking(start_id=THINK, end_id=END_THINK, budget=50) and sent.grammar
        stream = client.chat.completions.create(model="fake", messages=MESSAGES, tools=TOOLS, stream=True)
        deltas: list[Any] = [chunk.choices[0].delta for chunk in stream]
        assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == "I call f."
        assert any(delta.tool_calls for delta in deltas) and not any(delta.content for delta in deltas)


def test_markers_come_from_the_template() -> None:
    assert detect_thinking(None) is None and detect_thinking("{{ messages }}") is None
    for markers in MARKERS:
        assert detect_thinking(f"... {markers.end} ...") is markers


pieces = st.lists(
    st.sampled_from(["<think>", "</think>", "<thi", "nk>", "</", "a", " ", "\n", "<", "é"]), max_size=12
)


@given(parts=pieces, places=st.lists(st.integers(0, 99), max_size=8), opened=st.booleans())
@settings(max_examples=400, deadline=None)
def test_the_split_does_not_depend_on_the_cuts(parts: list[str], places: list[int], opened: bool) -> None:
    text = "".join(parts)

    def split(cuts: list[str]) -> tuple[str, str]:
        parser = ReasoningParser(MARKERS[0], 0, opened=opened)
        thoughts, answer = "", ""
        for events, visible in [*(parser.push(cut) for cut in cuts), parser.finish()]:
            thoughts += "".join(event.text for event in events if isinstance(event, Reasoning))
            answer += visible
        return thoughts, answer

    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    whole = split([text])
    assert split([text[a:b] for a, b in itertools.pairwise(edges)]) == whole
    assert split(list(text)) == whole
    if not opened and not text.lstrip().startswith("<think>"):
        assert whole == ("", text)
