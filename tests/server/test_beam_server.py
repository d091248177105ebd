"""Beam search over HTTP: the scripted engine's made-up log probabilities make the answers predictable."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from server_fake import FakeEngine, events_of, make_client, make_frontend

from octavo.api.beam import BeamSearch, run_search
from octavo.protocol.generate import BeamSearchParams, GenerateRequest, Logprob, Terms


class Ladder(FakeEngine):
    """Behind a text that ends with letter x the likeliest tokens are x + 1, x + 2, ..."""

    def step(self) -> None:
        for running in list(self.running.values()):
            sink, request = running.sink, running.request

            def likeliest(delta: Any, sink: Any = sink, request: GenerateRequest = request) -> None:
                last = request.prompt_token_ids[-1]
                delta.logprobs = [
                    [
                        Logprob(last + 1, -0.5, 1),
                        *(
                            Logprob(last + 1 + i, -0.5 - i, i + 1)
                            for i in range(request.sampling.logprobs or 0)
                        ),
                    ]
                ]
                sink(delta)

            running.sink = likeliest
        super().step()


@pytest.fixture
def engine() -> Ladder:
    return Ladder(rule=lambda request, done: [ord("x")])


def ask(engine: Ladder, route: str = "/v1/completions", **body: Any) -> Any:
    start: dict[str, Any] = {"prompt": "a"}
    if "chat" in route:
        start = {"messages": [{"role": "user", "content": "a"}]}
    return make_client(engine).post(route, json={**start, "use_beam_search": True, **body})


def test_the_best_beams_come_first(engine: Ladder) -> None:
    reply = ask(engine, n=3, max_tokens=3)
    assert reply.status_code == 200, reply.text
    body = reply.json()
    texts = [choice["text"] for choice in body["choices"]]
    assert texts[0] == "bcd" and len(set(texts)) == 3 and set(texts[1:]) <= {"cde", "bde", "bce"}
    assert [choice["finish_reason"] for choice in body["choices"]] == ["length"] * 3
    assert body["usage"] == {**body["usage"], "prompt_tokens": 1, "completion_tokens": 9}
    assert all(request.sampling.max_tokens == 1 for request in engine.submitted)
    assert len(engine.submitted) == 1 + 3 + 3 and not engine.running


def test_many_prompts_and_streams(engine: Ladder) -> None:
    reply = ask(engine, prompt=["a", "f"], n=2, max_tokens=2)
    assert [choice["text"] for choice in reply.json()["choices"]][::2] == ["bc", "gh"]
    events = events_of(ask(engine, n=2, max_tokens=2, stream=True).text)
    assert "".join(e["choices"][0]["text"] for e in events if e["choices"][0]["index"] == 0) == "bc"


def test_chat(engine: Ladder) -> None:
    reply = ask(engine, "/v1/chat/completions", n=2, max_tokens=2)
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["content"] == "?@"  # behind the ">" of the template


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", ["x"]),
        ("logprobs", 3),
        ("temperature", 0.7),
        ("presence_penalty", 0.5),
        ("structured_outputs", {"regex": "a"}),
        ("bad_words", ["x"]),
        ("n", 65),
    ],
)
def test_what_has_no_meaning_is_refused(engine: Ladder, field: str, value: Any) -> None:
    reply = ask(engine, **{"max_tokens": 2, field: value})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == field


def test_a_length_penalty_needs_beams(engine: Ladder) -> None:
    reply = ask(engine, use_beam_search=False, length_penalty=0.5)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "length_penalty"


def test_a_deadline_ends_the_search_with_what_there_is(engine: Ladder) -> None:
    reply = ask(engine, n=2, max_tokens=60, deadline_ms=2)
    assert reply.status_code == 200
    assert [choice["finish_reason"] for choice in reply.json()["choices"]] == ["deadline"] * 2
    assert not engine.running


def test_a_full_queue_is_a_429(engine: Ladder) -> None:
    engine.queue_limit = 2
    reply = ask(engine, n=4, max_tokens=3)
    assert reply.status_code == 429 and not engine.running


def test_disconnect_aborts(engine: Ladder) -> None:
    engine.paused = True

    async def go() -> None:
        search = BeamSearch(BeamSearchParams(beam_width=2, max_tokens=3), [], 3)
        work = run_search(make_frontend(engine), [97], search, request_id="r", terms=Terms())
        await asyncio.wait_for(work, 0.05)

    with pytest.raises(TimeoutError):
        asyncio.run(go())
    assert not engine.running and engine.aborted
