"""The table of bounds drives the fuzz: whatever a body holds, the reply is a 2xx or a 4xx in the one error form."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_fake import TEMPLATE, FakeEngine, make_client, says
from starlette.testclient import TestClient

from octavo.api.anthropic.schema import MessagesRequest
from octavo.api.cohere import CohereRequest
from octavo.api.ollama.schema import ChatRequest, GenerateRequest
from octavo.api.openai.pooling_schema import EmbeddingRequest, PoolingRequest, RerankRequest, ScoreRequest
from octavo.api.openai.responses.schema import ResponsesRequest
from octavo.api.openai.schema import ChatCompletionRequest, CompletionRequest, TokenizeRequest
from octavo.api.openai.tokens import TokensRequest
from octavo.protocol.control import ModelFacts

ROUTES: dict[str, tuple[type, dict[str, Any]]] = {
    "/v1/chat/completions": (ChatCompletionRequest, {"messages": [{"role": "user", "content": "Hi"}]}),
    "/v1/completions": (CompletionRequest, {"prompt": "a"}),
    "/tokenize": (TokenizeRequest, {"prompt": "a"}),
    "/v1/messages": (MessagesRequest, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}),
    "/v1/responses": (ResponsesRequest, {"input": "Hi"}),
    "/v1/embeddings": (EmbeddingRequest, {"input": "a"}),
    "/score": (ScoreRequest, {"text_1": "a", "text_2": "b"}),
    "/rerank": (RerankRequest, {"query": "a", "documents": ["b"]}),
    "/pooling": (PoolingRequest, {"input": "a"}),
    "/v2/embed": (CohereRequest, {"texts": ["a"]}),
    "/inference/v1/generate": (TokensRequest, {"token_ids": [72]}),
    "/api/chat": (ChatRequest, {"messages": [{"role": "user", "content": "Hi"}]}),
    "/api/generate": (GenerateRequest, {"prompt": "Hi"}),
}
SCHEMAS = make_client().get("/openapi.json").json()["components"]["schemas"]

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, -1, 2, 16, 20, 21, 128, 129, 299, 300, 2**31 - 1, 2**31, 2**63, -(2**63)])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "1", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def client() -> TestClient:
    return make_client(
        FakeEngine(max_model_len=40, rule=says("ab"), facts=ModelFacts(can_pool=True, hidden_size=8))
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), path=st.sampled_from(sorted(ROUTES)))
def test_any_value_of_any_field_gets_an_answer(client: TestClient, data: st.DataObject, path: str) -> None:
    kind, needed = ROUTES[path]
    names = st.sampled_from([*kind.__struct_fields__, "unknown"])  # type: ignore[attr-defined]
    body = {**needed, **data.draw(st.dictionaries(names, values, max_size=3))}
    reply = client.post(path, json=body)
    assert reply.status_code in (200, 400, 404), (body, reply.text)
    if reply.status_code == 200:
        return
    error = reply.json()["error"]
    if path.startswith("/api/"):
        assert error and "0x" not in error
    elif path == "/v1/messages":
        assert set(error) == {"type", "message"} and reply.json()["type"] == "error" and error["message"]
    else:
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert error["param"] is not None, (body, error)
        assert "0x" not in error["message"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=60), valid=st.booleans(), cut=st.integers(0, 60))
def test_any_bytes_get_an_answer(client: TestClient, body: bytes, valid: bool, cut: int) -> None:
    if valid:  # a good body with a hole in it
        whole = msgspec.json.encode({"prompt": "a", "logit_bias": {"5": 1.5}, "stop": ["é"]})
        body = whole[:cut] + body + whole[cut + 1 :]
    reply = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code in (200, 400), (body, reply.text)


def numeric_bounds() -> list[tuple[str, str, Any, int]]:
    """(path, field, value, status): both sides of every minimum and maximum in the OpenAPI document."""
    cases = []
    for path in ("/v1/chat/completions", "/v1/completions"):
        for name, schema in SCHEMAS[ROUTES[path][0].__name__]["properties"].items():
            for option in schema.get("anyOf", [schema]):
                if option.get("type") not in ("integer", "number"):
                    continue
                for key, step in (("minimum", -1), ("maximum", 1)):
                    if key in option:
                        cases += [(path, name, option[key], 200), (path, name, option[key] + step, 400)]
                if "exclusiveMinimum" in option:
                    cases.append((path, name, option["exclusiveMinimum"], 400))
    return cases


@pytest.mark.parametrize(("path", "name", "value", "status"), numeric_bounds())
def test_documented_bounds_are_the_enforced_ones(
    client: TestClient, path: str, name: str, value: Any, status: int
) -> None:
    body = {**ROUTES[path][1], name: value}
    if name == "top_logprobs":
        body["logprobs"] = True
    if name == "max_tokens" and value == 0:
        body["echo"] = True
    if name == "min_tokens" and value > 16:
        body["max_tokens"] = min(value, 2**31 - 1)
    if name == "length_penalty":
        body |= {"use_beam_search": True, "max_tokens": 2}
    if name == "thinking_token_budget":  # only for models that think aloud
        client = make_client(FakeEngine(rule=says("ab")), template=TEMPLATE + "{# </think> #}")
    reply = client.post(path, json=body)
    assert reply.status_code == status, reply.text
    if status == 400:
        assert reply.json()["error"]["param"] == name


def test_every_number_has_bounds() -> None:
    """A field without a range is how an untrusted integer reaches native code."""
    for kind, _ in ROUTES.values():
        for name, schema in SCHEMAS[kind.__name__]["properties"].items():
            for option in schema.get("anyOf", [schema]):
                if option.get("type") in ("integer", "number"):
                    assert {"minimum", "exclusiveMinimum"} & set(option), (kind, name)
                    assert "maximum" in option, (kind, name)
                if option.get("type") == "array" and name != "prompt":
                    assert "maxItems" in option, (kind, name)
                if option.get("type") == "string" and name not in ("prompt",) and "enum" not in option:
                    assert "maxLength" in option, (kind, name)
