"""Fields of sampling that the engine must hear of in its own words."""

from __future__ import annotations

import pytest
from server_fake import FakeEngine, make_client, make_frontend, says

from octavo.errors import RequestError
from octavo.protocol.generate import SamplingParams

ROUTES = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
}


@pytest.mark.parametrize("route", ROUTES)
def test_token_rules_reach_the_engine_as_tokens(route: str) -> None:
    engine = FakeEngine(rule=says("ab"))
    body = {**ROUTES[route], "bad_words": ["no", " way"], "allowed_token_ids": [97, 98, 257]}
    reply = make_client(engine).post(route, json=body)
    assert reply.status_code == 200, reply.text
    (asked,) = engine.submitted
    assert asked.bad_words == [[*b"no"], [*b" no"], [*b" way"]]
    assert asked.sampling.allowed_token_ids == [97, 98, 257]


@pytest.mark.parametrize("route", ROUTES)
def test_the_first_choice_leads_the_others(route: str) -> None:
    engine = FakeEngine(rule=says("ab"))
    assert make_client(engine).post(route, json={**ROUTES[route], "n": 4}).status_code == 200
    first, *others = engine.submitted
    assert first.leader is None and [one.leader for one in others] == [first.id] * 3


def test_every_prompt_has_a_leader_of_its_own() -> None:
    engine = FakeEngine(rule=says("ab"))
    make_client(engine).post("/v1/completions", json={"prompt": ["x", "y"], "n": 2})
    a, b, c, d = engine.submitted
    assert (a.leader, b.leader, c.leader, d.leader) == (None, a.id, None, c.id)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("allowed_token_ids", [300]),
        ("allowed_token_ids", [-1]),
        ("allowed_token_ids", []),
        ("bad_words", [""]),
        ("bad_words", ["x" * 257]),
        ("deadline_ms", 0),
        ("max_queue_ms", 10**9),
    ],
)
def test_bounds(field: str, value: object) -> None:
    reply = make_client(FakeEngine()).post("/v1/completions", json={"prompt": "x", field: value})
    assert reply.status_code == 400 and reply.json()["error"]["param"].startswith(field)


def test_words_without_tokens_are_refused() -> None:
    frontend = make_frontend(FakeEngine())
    frontend.tokenizer.encode = lambda text, add_special_tokens=True: []  # type: ignore[method-assign]
    with pytest.raises(RequestError, match="no tokens"):
        frontend.bad_words(SamplingParams(bad_words=["x"]))
