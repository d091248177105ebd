"""A real embedding model behind the real server: all-MiniLM-L6-v2 out of the catalogue, asked by the real clients and
compared with transformers' hidden states, pooled and scaled as sentence-transformers does."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import ollama
import openai
import pytest
import torch

from octavo.files.resolve import pull

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

pytestmark = pytest.mark.model

MODEL = "all-minilm:22m"
TEXTS = [
    "The cat sits on the mat.",
    "A feline rests on a rug.",
    "Stock markets fell sharply on Tuesday.",
    "wörld 🎉 " * 30,
    "x",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return pull(MODEL)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "octavo", "serve", MODEL, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        if not found:
            process.kill()
            pytest.fail(f"no URL in {line!r}; {process.communicate()[1][-2000:]}")
        yield found[0]
        assert process.poll() is None, "the server ended during the tests"
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def expected(folder: Path) -> np.ndarray:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder).eval()
    vectors = []
    with torch.no_grad():
        for text in TEXTS:
            given = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            vectors.append(torch.nn.functional.normalize(model(**given).last_hidden_state.mean(dim=1))[0])
    return np.asarray(torch.stack(vectors))


def test_openai_client_gets_sentence_transformers_vectors(url: str, expected: np.ndarray) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        reply = client.embeddings.create(model=MODEL, input=TEXTS)
        found = np.array([item.embedding for item in reply.data])
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert found.shape == (len(TEXTS), 384)
        short = client.embeddings.create(model=MODEL, input=TEXTS[0], dimensions=64)
        head = expected[0, :64] / np.linalg.norm(expected[0, :64])
        np.testing.assert_allclose(short.data[0].embedding, head, atol=1e-4)


def test_ollama_client(url: str, expected: np.ndarray) -> None:
    with ollama.Client(host=url) as client:
        np.testing.assert_allclose(client.embed(MODEL, TEXTS).embeddings, expected, atol=1e-4)
        assert client.show(MODEL).capabilities == ["embedding"]


def test_score_and_rerank(url: str, expected: np.ndarray) -> None:
    scores = httpx.post(f"{url}/score", json={"text_1": TEXTS[0], "text_2": TEXTS[1:3]}).json()["data"]
    np.testing.assert_allclose([item["score"] for item in scores], expected[1:3] @ expected[0], atol=1e-4)
    asked = {"query": "Where is the kitty?", "documents": TEXTS[:3], "top_n": 2}
    results = httpx.post(f"{url}/v1/rerank", json=asked).json()["results"]
    assert {result["index"] for result in results} == {0, 1}


def test_generation_is_refused_with_the_reason(url: str) -> None:
    reply = httpx.post(f"{url}/v1/completions", json={"prompt": "Hi"})
    assert reply.status_code == 400 and "/v1/embeddings" in reply.text
    too_long = httpx.post(f"{url}/v1/embeddings", json={"input": "cat " * 300})
    assert too_long.status_code == 400 and "the model holds 256" in too_long.text
    cut = httpx.post(f"{url}/v1/embeddings", json={"input": "cat " * 300, "truncate_prompt_tokens": -1})
    assert cut.json()["usage"]["prompt_tokens"] == 256
