"""Classes, cross-encoders, ``/pooling`` and Cohere's ``/v2/embed`` over HTTP."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from server_fake import FakeEngine, fake_classes, fake_vector, make_client, make_tokenizer
from starlette.testclient import TestClient
from test_embeddings import client_of, ids_of, unit
from tokenizers.processors import TemplateProcessing

from octavo.api.vectors import probabilities
from octavo.protocol.control import ModelFacts

LABELS = ("no", "maybe", "yes")


def classifier(labels: tuple[str, ...] = LABELS, activation: str = "softmax", **more: Any) -> TestClient:
    facts = ModelFacts(can_generate=False, can_pool=True, labels=labels, activation=activation, **more)  # type: ignore[arg-type]
    tokenizer = make_tokenizer(special=True)
    # A pair as BERT writes it: the type of a token says to which text it belongs.
    tokenizer.backend.post_processor = TemplateProcessing(
        single="$A <think>", pair="$A <think> $B:1 <think>:1", special_tokens=[("<think>", 298)]
    )
    engine = FakeEngine(facts=facts, max_model_len=40)
    client = make_client(engine, tokenizer=tokenizer)
    client.engine = engine  # type: ignore[attr-defined]
    return client


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum()


def test_classify() -> None:
    client = classifier()
    reply = client.post("/classify", json={"input": ["abb", "cccc"]}).json()
    assert [item["label"] for item in reply["data"]] == ["maybe", "yes"]
    for item, text in zip(reply["data"], (b"abb", b"cccc")):
        np.testing.assert_allclose(item["probs"], softmax(fake_classes(list(text), 0, 3)), rtol=1e-5)
        assert item["num_classes"] == 3
    assert reply["usage"]["total_tokens"] == 9 and reply["id"].startswith("classify-")
    plain = client.post("/classify", json={"input": "abb", "use_activation": False}).json()["data"][0]
    assert plain["probs"] == [0.0, 1.0, -1.0]
    several = classifier(activation="sigmoid").post("/classify", json={"input": "abb"}).json()["data"][0]
    np.testing.assert_allclose(several["probs"], 1 / (1 + np.exp([-0.0, -1.0, 1.0])), rtol=1e-5)
    said = client.post("/classify", json={"messages": [{"role": "user", "content": "cc"}]}).json()
    assert said["data"][0]["num_classes"] == 3


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_a_cross_encoder_reads_pairs_together(path: str) -> None:
    client = classifier(("fits",), "sigmoid")
    reply = client.post(path, json={"queries": "aaa", "items": ["aaab", "bbb"]}).json()
    scores = [item["score"] for item in reply["data"]]
    np.testing.assert_allclose(scores, [1 / (1 + np.exp(-2.0)), 1 / (1 + np.exp(1.0))], rtol=1e-5)
    first, second = client.engine.submitted  # type: ignore[attr-defined]
    assert first.prompt_token_ids == [*b"aaa", 298, *b"aaab", 298]
    assert first.pooling == second.pooling == "classify" and first.second_at == 4
    plain = client.post(
        path, json={"text_1": ["aa", "a"], "text_2": ["aa", "b"], "use_activation": False}
    ).json()
    assert [item["score"] for item in plain["data"]] == [1.0, -1.0]


def test_a_cross_encoder_ranks() -> None:
    client = classifier(("fits",), "identity")
    asked = {"query": "aaa", "documents": ["b", "aab", "aaab"], "top_n": 2}
    results = client.post("/rerank", json=asked).json()["results"]
    assert [(result["index"], result["relevance_score"]) for result in results] == [(2, 2.0), (1, 1.0)]
    cut = {**asked, "max_tokens_per_doc": 2, "max_tokens_per_query": 1}
    client.post("/rerank", json=cut)
    assert client.engine.submitted[-1].prompt_token_ids == [*b"a", 298, *b"aa", 298]  # type: ignore[attr-defined]
    long = {"query": "a", "documents": ["b" * 60]}
    assert client.post("/rerank", json=long).json()["error"]["param"] == "documents"
    assert client.post("/rerank", json={**long, "truncate_prompt_tokens": -1}).status_code == 200
    ids = client.engine.submitted[-1].prompt_token_ids  # type: ignore[attr-defined]
    assert len(ids) == 40 and ids[-1] == 298


def test_pooling() -> None:
    client = client_of()
    reply = client.post("/pooling", json={"input": ["abc", "hh"]}).json()
    np.testing.assert_allclose(reply["data"][1]["data"], unit("hh"), rtol=1e-6)
    assert reply["data"][0]["object"] == "pooling"
    coded = client.post("/pooling", json={"input": "abc", "encoding_format": "base64", "dimensions": 2})
    data = np.frombuffer(base64.b64decode(coded.json()["data"][0]["data"]), "<f4")
    np.testing.assert_allclose(data, unit("abc", 2), rtol=1e-6)
    both = classifier(hidden_size=8)
    assert len(both.post("/pooling", json={"input": "abc"}).json()["data"][0]["data"]) == 3
    assert len(both.post("/pooling", json={"input": "abc", "task": "embed"}).json()["data"][0]["data"]) == 8


def test_a_vector_for_every_token() -> None:
    client = client_of(is_encoder=True)
    asked = {"input": ["ab", "c"], "task": "token_embed", "add_special_tokens": False}
    first, second = client.post("/pooling", json=asked).json()["data"]
    np.testing.assert_allclose(first["data"], [unit("a"), unit("b")], rtol=1e-6)
    np.testing.assert_allclose(second["data"], [unit("c")], rtol=1e-6)
    coded = {**asked, "encoding_format": "base64", "dimensions": 4, "normalize": False}
    raw = base64.b64decode(client.post("/pooling", json=coded).json()["data"][0]["data"])
    numbers = np.frombuffer(raw, "<f4").reshape(2, 4)
    assert numbers.tolist() == [[2, 1, 1, 1], [1, 2, 1, 1]]


def test_cohere() -> None:
    client = client_of()
    texts = ["abc", "hhhh"]
    asked = {
        "model": "fake",
        "texts": texts,
        "input_type": "search_query",
        "embedding_types": ["float", "base64", "binary", "ubinary"],
    }
    reply = client.post("/v2/embed", json=asked).json()
    made = np.stack([unit(text) for text in texts])
    np.testing.assert_allclose(reply["embeddings"]["float"], made, rtol=1e-6)
    coded = [np.frombuffer(base64.b64decode(row), "<f4") for row in reply["embeddings"]["base64"]]
    np.testing.assert_allclose(coded, made, rtol=1e-6)
    assert reply["embeddings"]["ubinary"] == [[255], [255]]
    assert reply["embeddings"]["binary"] == [[127], [127]]
    assert reply["texts"] == texts and reply["meta"]["billed_units"]["input_tokens"] == 7
    parts = {"inputs": [{"content": [{"type": "text", "text": "abc"}]}], "output_dimension": 3}
    found = client.post("/v2/embed", json=parts).json()["embeddings"]
    assert set(found) == {"float"}
    np.testing.assert_allclose(found["float"][0], unit("abc", 3), rtol=1e-6)
    for how, kept in (("END", "a" * 4), ("START", "b" * 4)):
        cut = {"texts": ["a" * 30 + "b" * 30], "max_tokens": 4, "truncate": how}
        reply = client.post("/v2/embed", json=cut).json()
        np.testing.assert_allclose(reply["embeddings"]["float"][0], unit(kept), rtol=1e-6)
        assert reply["meta"]["billed_units"]["input_tokens"] == 4


def test_invocations_of_a_classifier() -> None:
    client = classifier()
    assert client.post("/invocations", json={"input": "cc"}).json()["data"][0]["label"] == "yes"
    one = classifier(("fits",), "identity")
    scored = one.post("/invocations", json={"data_1": "a", "data_2": "aa"}).json()
    assert scored["data"][0]["score"] == 0.0


@pytest.mark.parametrize(
    ("client", "path", "body", "param"),
    [
        (client_of(), "/classify", {"input": "a"}, "model"),
        (client_of(), "/pooling", {"input": "a", "task": "classify"}, "model"),
        (client_of(), "/pooling", {"input": "a", "task": "token_embed"}, "task"),
        (client_of(), "/pooling", {"input": "a", "task": "token_classify"}, "task"),
        (
            client_of(is_encoder=True, hidden_size=1 << 23),
            "/pooling",
            {"input": "ab", "task": "token_embed"},
            "input",
        ),
        (client_of(), "/score", {"text_1": "a", "text_2": "a", "use_activation": False}, "use_activation"),
        (client_of(), "/score", {"queries": "a", "documents": "a", "items": "a"}, "text_1"),
        (client_of(), "/v2/embed", {"texts": ["a"], "images": ["x"]}, "images"),
        (client_of(), "/v2/embed", {}, "texts"),
        (client_of(), "/v2/embed", {"texts": ["a"], "embedding_types": ["int8"]}, "embedding_types"),
        (
            client_of(),
            "/v2/embed",
            {"texts": ["a", "abc"], "truncate": "NONE", "max_tokens": 2},
            "texts[1]",
        ),
        (client_of(), "/v2/embed", {"texts": ["a"], "output_dimension": 9}, "dimensions"),
        (classifier(), "/score", {"text_1": "a", "text_2": "b"}, "model"),
        (classifier(), "/rerank", {"query": "a", "documents": ["b"]}, "model"),
        (classifier(), "/pooling", {"input": "a", "dimensions": 2}, "dimensions"),
        (classifier(), "/classify", {}, "input"),
    ],
)
def test_errors_name_the_field(client: TestClient, path: str, body: dict[str, Any], param: str) -> None:
    reply = client.post(path, json=body)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param, reply.text


def test_probabilities_of_large_numbers() -> None:
    made = np.array([[1e4, -1e4, 0.0]], "<f4")
    np.testing.assert_allclose(probabilities(made, "softmax"), [[1, 0, 0]])
    np.testing.assert_allclose(probabilities(made, "sigmoid"), [[1, 0, 0.5]])
    assert probabilities(made, "identity") is made


def test_the_fake_vectors_are_what_the_tests_think() -> None:
    assert fake_vector(ids_of("abc")).tolist() == [2, 2, 2, 1, 1, 1, 1, 1]
