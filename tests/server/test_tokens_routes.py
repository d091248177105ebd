"""Requests as tokens, tokens answered with tokens, and the one route of SageMaker; prompts that are cut to fit."""

from __future__ import annotations

from typing import Any

import pytest
from server_fake import FakeEngine, events_of, make_client, make_tokenizer, says

from octavo.protocol.control import ModelFacts

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
PROMPT = "<user>Hi</user><assistant>"


def test_what_is_rendered_is_what_would_be_asked() -> None:
    engine = FakeEngine(rule=says("ok"))
    client = make_client(engine)
    asked = {"messages": MESSAGES, "temperature": 0.5, "max_tokens": 7, "seed": 3, "cache_salt": "s"}
    rendered = client.post("/v1/chat/completions/render", json=asked).json()
    assert not engine.submitted
    assert make_tokenizer().decode(rendered["token_ids"]) == PROMPT
    assert rendered["sampling_params"] == {"temperature": 0.5, "max_tokens": 7, "seed": 3}
    reply = client.post("/inference/v1/generate", json=rendered).json()
    client.post("/v1/chat/completions", json=asked)
    first, second = engine.submitted
    assert first.prompt_token_ids == second.prompt_token_ids and first.cache_salt == second.cache_salt
    assert (first.sampling.temperature, first.sampling.seed, first.sampling.max_tokens) == (0.5, 3, 7)
    (choice,) = reply["choices"]
    assert choice["token_ids"] == [*b"ok", 257] and choice["finish_reason"] == "stop"
    assert reply["usage"]["prompt_tokens"] == len(first.prompt_token_ids)
    two = client.post("/v1/completions/render", json={"prompt": ["a", "bc"]}).json()["requests"]
    assert [make_tokenizer().decode(one["token_ids"]) for one in two] == ["a", "bc"]


def test_tokens_stream_with_logprobs_and_n() -> None:
    client = make_client(FakeEngine(rule=says("Hello")))
    body: dict[str, Any] = {
        "token_ids": [72, 105],
        "sampling_params": {"n": 2, "max_tokens": 4, "logprobs": 1},
    }
    whole = client.post("/inference/v1/generate", json=body).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    assert len(whole["choices"][0]["logprobs"]["content"]) == 4
    events = events_of(client.post("/inference/v1/generate", json={**body, "stream": True}).text)
    for index in range(2):
        mine = [c for event in events for c in event["choices"] if c["index"] == index]
        assert [i for c in mine for i in c["token_ids"]] == whole["choices"][index]["token_ids"]
        assert mine[-1]["finish_reason"] == "length"
    assert events[-1]["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "token_ids"),
        ({"token_ids": []}, "prompt"),
        ({"token_ids": [300]}, "prompt"),
        ({"token_ids": [1], "sampling_params": {"stop": "x"}}, "sampling_params.stop"),
        ({"token_ids": [1], "sampling_params": {"top_p": 0}}, "sampling_params.top_p"),
        ({"token_ids": [1], "sampling_params": {"top_q": 0}}, "sampling_params.top_q"),
    ],
)
def test_wrong_tokens(body: dict[str, Any], param: str) -> None:
    reply = make_client().post("/inference/v1/generate", json=body)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param, reply.text


def test_invocations() -> None:
    client = make_client(FakeEngine(rule=says("ok")))
    assert client.post("/invocations", json={"messages": MESSAGES}).json()["object"] == "chat.completion"
    assert client.post("/invocations", json={"prompt": "a"}).json()["object"] == "text_completion"
    events = events_of(client.post("/invocations", json={"messages": MESSAGES, "stream": True}).text)
    assert events[0]["object"] == "chat.completion.chunk"
    for body in ({"x": 1}, [], {"messages": MESSAGES, "max_token": 1}):
        assert client.post("/invocations", json=body).status_code == 400
    facts = ModelFacts(can_generate=False, can_pool=True, pooling="mean", hidden_size=8)
    pooling = make_client(FakeEngine(facts=facts))
    for body, kind in (
        ({"input": "a"}, "embedding"),
        ({"messages": MESSAGES}, "embedding"),
        ({"text_1": "a", "text_2": "b"}, "score"),
    ):
        assert pooling.post("/invocations", json=body).json()["data"][0]["object"] == kind
    ranked = pooling.post("/invocations", json={"query": "a", "documents": ["b"]}).json()
    assert ranked["results"][0]["index"] == 0


def test_prompts_are_cut_to_fit() -> None:
    engine = FakeEngine(rule=says("ok"), max_model_len=40)
    client = make_client(engine)

    def asked(path: str, body: dict[str, Any]) -> str:
        reply = client.post(path, json=body)
        assert reply.status_code == 200, reply.text
        return make_tokenizer().decode(engine.submitted[-1].prompt_token_ids)

    long = "x" * 60 + "end"
    assert asked("/v1/completions", {"prompt": long, "truncate_prompt_tokens": 5, "max_tokens": 2}) == "xxend"
    assert (
        len(asked("/v1/completions", {"prompt": long, "truncate_prompt_tokens": -1, "max_tokens": 10})) == 30
    )
    chat = {"messages": [{"role": "user", "content": long}], "truncate_prompt_tokens": -1}
    assert asked("/v1/chat/completions", chat).endswith("xend</user><assistant>")
    reply = client.post("/v1/completions", json={"prompt": "a", "truncate_prompt_tokens": -2})
    assert reply.status_code == 400


def test_documents_reach_the_template() -> None:
    template = (
        "{% for d in documents %}[{{ d.text }}]{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    engine = FakeEngine(rule=says("ok"))
    body = {"messages": MESSAGES, "documents": [{"text": "one"}, {"text": "two"}]}
    assert make_client(engine, template=template).post("/v1/chat/completions", json=body).status_code == 200
    assert make_tokenizer().decode(engine.submitted[0].prompt_token_ids) == "[one][two]Hi"
