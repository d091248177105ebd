"""Vectors, scores and rankings over HTTP, asked by the real openai and ollama packages."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import ollama
import openai
import pytest
from server_fake import FakeEngine, Live, fake_vector, live_server, make_client, make_tokenizer
from starlette.testclient import TestClient

from octavo.protocol.control import ModelFacts

POOLS = ModelFacts(can_generate=False, can_pool=True, pooling="mean", normalize=True, hidden_size=8)


def ids_of(text: str) -> list[int]:
    return make_tokenizer().encode(text)


def unit(text: str, dimensions: int = 8) -> np.ndarray:
    vector = fake_vector(ids_of(text))[:dimensions]
    return vector / np.linalg.norm(vector)


def client_of(**facts: Any) -> TestClient:
    known = {"can_generate": False, "can_pool": True, "pooling": "mean", "normalize": True, "hidden_size": 8}
    return make_client(FakeEngine(facts=ModelFacts(**{**known, **facts}), max_model_len=40))


@contextmanager
def serving() -> Iterator[tuple[Live, openai.OpenAI]]:
    with (
        live_server(FakeEngine(facts=POOLS)) as live,
        openai.OpenAI(base_url=live.url, api_key="x", max_retries=0, timeout=20) as client,
    ):
        yield live, client


def test_openai_client() -> None:
    with serving() as (live, client):
        texts = ["abc", "hhhh", "wörld"]
        for form in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            reply = client.embeddings.create(model="fake", input=texts, **form)  # type: ignore[call-overload]
            assert [item.index for item in reply.data] == [0, 1, 2]
            for text, item in zip(texts, reply.data):
                given = item.embedding
                if isinstance(given, str):
                    given = np.frombuffer(base64.b64decode(given), "<f4")
                np.testing.assert_allclose(given, unit(text), rtol=1e-6)
            assert reply.usage.prompt_tokens == sum(len(ids_of(text)) for text in texts)
        assert all(request.pooling == "mean" for request in live.engine.submitted)
        short = client.embeddings.create(model="fake", input="abc", dimensions=3, encoding_format="float")
        np.testing.assert_allclose(short.data[0].embedding, unit("abc", 3), rtol=1e-6)
        by_ids = client.embeddings.create(model="fake", input=[ids_of("abc"), ids_of("hhhh")])
        np.testing.assert_allclose(by_ids.data[1].embedding, unit("hhhh"), rtol=1e-6)
        one = client.embeddings.create(model="fake", input=ids_of("abc"))
        np.testing.assert_allclose(one.data[0].embedding, unit("abc"), rtol=1e-6)
        with pytest.raises(openai.BadRequestError, match="gives embeddings"):
            client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "Hi"}])


def test_ollama_client() -> None:
    with live_server(FakeEngine(facts=POOLS)) as live, ollama.Client(host=live.url[:-3]) as client:
        reply = client.embed("fake", ["abc", "hhhh"])
        np.testing.assert_allclose(reply.embeddings[1], unit("hhhh"), rtol=1e-6)
        assert reply.prompt_eval_count == len(ids_of("abc")) + len(ids_of("hhhh"))
        assert reply.total_duration is not None and reply.total_duration > 0
        np.testing.assert_allclose(client.embed("fake", "abc", dimensions=2).embeddings[0], unit("abc", 2))
        np.testing.assert_allclose(client.embeddings("fake", "abc").embedding, unit("abc"), rtol=1e-6)
        assert client.show("fake").capabilities == ["embedding"]
        long = client.embed("fake", "a" * 600)
        assert long.prompt_eval_count == 512
        with pytest.raises(ollama.ResponseError, match="tokens"):
            client.embed("fake", "a" * 600, truncate=False)


def test_not_normalized() -> None:
    client = client_of(normalize=False)
    plain = client.post("/v1/embeddings", json={"input": "abc"}).json()["data"][0]["embedding"]
    assert plain == fake_vector(ids_of("abc")).tolist()
    scaled = client.post("/v1/embeddings", json={"input": "abc", "normalize": True}).json()["data"][0]
    np.testing.assert_allclose(scaled["embedding"], unit("abc"), rtol=1e-6)
    asked = {"input": "abc", "use_activation": False, "dimensions": 2}
    assert client_of().post("/v1/embeddings", json=asked).json()["data"][0]["embedding"] == [2.0, 2.0]


def test_conversations() -> None:
    asked = {"messages": [{"role": "user", "content": "abc"}]}
    found = client_of().post("/v1/embeddings", json=asked).json()["data"][0]["embedding"]
    expected = fake_vector(list(b"<user>abc</user>"))
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), rtol=1e-6)


def test_truncation() -> None:
    client = client_of()
    text = "a" * 30 + "b" * 30
    for most, side, kept in (
        (-1, "right", "a" * 30 + "b" * 10),
        (10, "right", "a" * 10),
        (10, "left", "b" * 10),
        (40, None, "a" * 30 + "b" * 10),
    ):
        asked = {"input": text, "truncate_prompt_tokens": most, "truncation_side": side}
        asked["add_special_tokens"] = False
        reply = client.post("/v1/embeddings", json=asked).json()
        np.testing.assert_allclose(reply["data"][0]["embedding"], unit(kept), rtol=1e-6)
        assert reply["usage"]["prompt_tokens"] == len(kept)


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_score(path: str) -> None:
    client = client_of()
    for first, second in (("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2")):
        reply = client.post(path, json={first: "aab", second: ["aab", "hhhh"]}).json()
        scores = [item["score"] for item in reply["data"]]
        np.testing.assert_allclose(scores, [1.0, unit("aab") @ unit("hhhh")], rtol=1e-5)
    pairs = client.post(path, json={"text_1": ["aa", "bb"], "text_2": ["aa", "hh"]}).json()["data"]
    np.testing.assert_allclose([item["score"] for item in pairs], [1.0, unit("bb") @ unit("hh")], rtol=1e-5)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank(path: str) -> None:
    client = client_of()
    asked = {"query": "aaa", "documents": ["hhh", {"text": "aaa"}, "aah"]}
    reply = client.post(path, json=asked).json()
    assert [result["index"] for result in reply["results"]] == [1, 2, 0]
    assert reply["results"][0]["document"] == {"text": "aaa"}
    scores = [result["relevance_score"] for result in reply["results"]]
    assert scores == sorted(scores, reverse=True) and scores[0] == pytest.approx(1.0)
    top = client.post(path, json={**asked, "top_n": 1, "return_documents": False}).json()["results"]
    assert len(top) == 1 and set(top[0]) == {"index", "relevance_score"}
    cut = client.post(path, json={"query": "a", "documents": ["ah" * 30], "max_tokens_per_doc": 4}).json()
    assert cut["usage"]["total_tokens"] == len(ids_of("a")) + 4


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": ""}, "input"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": ["a", 5]}, "input[1]"),
        ("/v1/embeddings", {"input": [1, 300]}, "input"),
        ("/v1/embeddings", {"input": "a" * 41}, "input"),
        ("/v1/embeddings", {"input": "a", "dimensions": 9}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "dimensions": 0}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": 41}, "truncate_prompt_tokens"),
        ("/v1/embeddings", {"input": "a", "temperature": 1}, "temperature"),
        ("/score", {"text_1": "a"}, "text_1"),
        ("/score", {"text_1": "a", "documents": "b"}, "text_1"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a"]}, "text_1"),
        ("/rerank", {"query": "a", "documents": []}, "documents"),
        ("/rerank", {"query": "a", "documents": ["a", "b" * 50]}, "documents[1]"),
    ],
)
def test_errors_name_the_field(path: str, body: dict[str, Any], param: str) -> None:
    reply = client_of().post(path, json=body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param, reply.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "a"}),
        ("/score", {"text_1": "a", "text_2": "b"}),
        ("/rerank", {"query": "a", "documents": ["b"]}),
        ("/api/embed", {"input": "a"}),
    ],
)
def test_a_generative_server_says_how_to_get_vectors(path: str, body: dict[str, Any]) -> None:
    reply = make_client().post(path, json=body)
    assert reply.status_code == 400 and "--runner pooling" in reply.text
