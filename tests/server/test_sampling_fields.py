"""Fields of sampling that the engine must hear of in its own words."""

from __future__ import annotations

from typing import Any

import pytest
from server_fake import FakeEngine, make_client, make_frontend, says

from octavo.engine.client.base import Sink
from octavo.errors import RequestError
from octavo.protocol.generate import Dry, GenerateRequest, SamplingParams, TokenDelta

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
def test_dry_reaches_the_engine_with_breakers_as_tokens(route: str) -> None:
    engine = FakeEngine(rule=says("ab"))
    client = make_client(engine)
    for _ in range(2):  # the second time the breakers are known
        body = {**ROUTES[route], "dry_multiplier": 0.5, "dry_sequence_breakers": ["x", "think"]}
        assert client.post(route, json=body).status_code == 200
        assert engine.submitted[-1].dry == Dry(0.5, 1.75, 2, [120, 298, 299])
    assert client.post(route, json={**ROUTES[route], "dry_multiplier": 0}).status_code == 200
    assert engine.submitted[-1].dry is None
    reply = client.post(route, json={**ROUTES[route], "dry_base": 9})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "dry_base"


class Stuck(FakeEngine):
    """Sees at its second step that it repeats itself."""

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        def told(delta: TokenDelta) -> None:
            if delta.tokens[-1] == ord("b"):
                del self.running[request.id]
                delta.finish_reason = "repetition"
            sink(delta)

        super().submit(request, told)


@pytest.mark.parametrize("route", [*ROUTES, "/v1/messages", "/api/chat", "/v1/responses"])
def test_an_answer_that_repeats_itself_says_so(route: str) -> None:
    engine = Stuck(rule=says("abababab", step=1))
    asked = {"repetition_detection": {"max_pattern_size": 2, "min_count": 3}}
    other: dict[str, Any] = {
        "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9},
        "/api/chat": {"messages": [{"role": "user", "content": "x"}], "stream": False},
        "/v1/responses": {"input": "x"},
    }
    reply = make_client(engine).post(route, json=other.get(route) or {**ROUTES[route], **asked})
    assert reply.status_code == 200, reply.text
    if route in ROUTES:
        choice = reply.json()["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("repetition", "repetition_detected")
        detection = engine.submitted[0].sampling.repetition_detection
        assert detection is not None and (detection.max_pattern_size, detection.min_count) == (2, 3)
        wrong = {"repetition_detection": {"max_pattern_size": 2, "min_pattern_size": 3}}
        refused = make_client(engine).post(route, json={**ROUTES[route], **wrong})
        assert refused.status_code == 400 and "repetition_detection" in refused.text
    else:
        reasons = {"/v1/messages": ("stop_reason", "end_turn"), "/api/chat": ("done_reason", "stop")}
        name, expected = reasons.get(route, ("status", "completed"))
        assert reply.json()[name] == expected


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
