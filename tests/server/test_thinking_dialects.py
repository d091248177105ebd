"""Budgets of thoughts in every dialect's words reach the engine; thoughts are counted in every dialect's usage."""

from __future__ import annotations

from typing import Any

import pytest
from server_fake import END_THINK, EOS, THINK, FakeEngine, make_client
from test_dialects_agree import HI, THINKS

TOKENS = [THINK, *b"hm", END_THINK, *b"42", EOS]
CHAT, RESPONSES, MESSAGES, LOCAL = "/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat"
PLAIN = "/v1/completions"
FORMS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HI},
    RESPONSES: {"input": "Hi"},
    MESSAGES: {"messages": HI, "max_tokens": 90},
    LOCAL: {"messages": HI, "stream": False},
    PLAIN: {"prompt": "Hi"},
}


def enabled(budget: int) -> dict[str, Any]:
    return {"thinking": {"type": "enabled", "budget_tokens": budget}}


@pytest.mark.parametrize(
    ("path", "asked", "budget"),
    [
        (CHAT, {}, None),
        (CHAT, {"thinking_token_budget": 0}, 0),
        (CHAT, {"thinking_token_budget": 9}, 9),
        (CHAT, {"thinking_token_budget": -1}, None),
        (CHAT, {"reasoning_effort": "none"}, 0),
        (CHAT, {"reasoning_effort": "minimal"}, 256),
        (CHAT, {"reasoning_effort": "high"}, 16384),
        (CHAT, {"reasoning_effort": "max"}, None),
        (CHAT, {"reasoning_effort": "low", "thinking_token_budget": 5}, 5),
        (RESPONSES, {"reasoning": {"effort": "none"}}, 0),
        (RESPONSES, {"reasoning": {"effort": "medium"}}, 4096),
        (RESPONSES, {"thinking_token_budget": 0}, 0),
        (RESPONSES, {"thinking_token_budget": -1}, None),
        (MESSAGES, enabled(0), 0),
        (MESSAGES, enabled(1024), 1024),
        (MESSAGES, enabled(-1), None),
        (MESSAGES, {"thinking": {"type": "disabled"}}, 0),
        (MESSAGES, {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, 1024),
        (PLAIN, {}, None),
        (PLAIN, {"thinking_token_budget": -1}, None),
        (PLAIN, {"thinking_token_budget": 0}, 0),
        (PLAIN, {"thinking_token_budget": 9, "n": 2}, 9),
        (LOCAL, {"think": False}, 0),
        (LOCAL, {"think": True}, None),
        (LOCAL, {"think": "low"}, 1024),
    ],
)
def test_budgets(path: str, asked: dict[str, Any], budget: int | None) -> None:
    engine = FakeEngine(rule=lambda _, done: TOKENS[done : done + 1])
    reply = make_client(engine, template=THINKS).post(path, json={**FORMS[path], **asked})
    assert reply.status_code == 200, reply.text
    watched = engine.submitted[0].thinking
    assert (None if watched is None else watched.budget) == budget


def test_thoughts_in_prompts_to_continue_count_each_for_itself() -> None:
    engine = FakeEngine(rule=lambda _, done: TOKENS[done : done + 1])
    client = make_client(engine, template=THINKS)
    prompts = [[72], [72, THINK, 97, 98], [72, THINK, 97, END_THINK]]
    asked = {"prompt": prompts, "thinking_token_budget": 5}
    assert client.post(PLAIN, json=asked).status_code == 200
    watched = [request.thinking for request in engine.submitted]
    assert [one and one.num_prompt_tokens for one in watched] == [None, 2, None]
    assert [one is None for one in watched] == [False, False, True]
    reply = make_client(FakeEngine()).post(PLAIN, json=asked)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "thinking_token_budget"


@pytest.mark.parametrize("path", [CHAT, RESPONSES, LOCAL])
def test_a_model_that_does_not_think_ignores_efforts(path: str) -> None:
    asked: dict[str, Any] = {
        CHAT: {"reasoning_effort": "low"},
        RESPONSES: {"reasoning": {"effort": "low"}},
    }.get(path, {"think": False})
    engine = FakeEngine()
    assert make_client(engine).post(path, json={**FORMS[path], **asked}).status_code == 200
    assert engine.submitted[0].thinking is None


def test_the_template_s_own_switch_is_thrown() -> None:
    source = THINKS + "{% if enable_thinking is defined %}[{{ enable_thinking }}]{% endif %}"
    engine = FakeEngine(rule=lambda _, done: TOKENS[done : done + 1])
    client = make_client(engine, template=source)
    client.post(CHAT, json={**FORMS[CHAT], "reasoning_effort": "none"})
    client.post(CHAT, json={**FORMS[CHAT], "reasoning_effort": "low"})
    given = {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}
    client.post(CHAT, json={**FORMS[CHAT], **given})
    ends = [bytes(request.prompt_token_ids).decode()[-7:] for request in engine.submitted]
    assert ends == ["[False]", "istant>", "t>[True]"[-7:]]


def test_thoughts_are_counted() -> None:
    client = make_client(FakeEngine(rule=lambda _, done: TOKENS[done : done + 1]), template=THINKS)
    usage = client.post(CHAT, json=FORMS[CHAT]).json()["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 4} and usage["completion_tokens"] == 7
    details = client.post(RESPONSES, json=FORMS[RESPONSES]).json()["usage"]["output_tokens_details"]
    assert details == {"reasoning_tokens": 4}
