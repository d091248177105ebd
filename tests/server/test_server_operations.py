"""Metrics, the OpenAPI document and the options: what operators read and write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_fake import FakeEngine, make_app, make_client, says
from starlette.testclient import TestClient

from octavo.api.openai.schema import ChatCompletionRequest, not_yet
from octavo.api.server.errors import error_reply, validation_error
from octavo.api.server.metrics import Histogram, RequestMetrics
from octavo.api.server.options import ServerOptions, ServerSettings
from octavo.api.server.routes import route_table
from octavo.errors import EngineDeadError, OutOfMemoryError, QueueFullError, RequestError, UsageError


def samples(client: TestClient) -> dict[str, float]:
    """Sample name and the labels that are not the same everywhere, to value."""
    reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            found[sample.name + (str(sorted(labels.items())) if labels else "")] = sample.value
    return found


@pytest.mark.parametrize("prefix", ["octavo", "vllm"])
def test_metrics_count_what_happened(prefix: str) -> None:
    client = make_client(FakeEngine(rule=says("abcd", step=2)), metrics_prefix=prefix)
    client.post("/v1/completions", json={"prompt": "xyz", "n": 2, "max_tokens": 3})
    client.post("/v1/completions", json={"prompt": "xyz", "max_tokens": 9, "stream": True})
    client.post("/v1/completions", json={"prompt": ""})
    client.get("/nowhere")
    found = samples(client)
    counts = {
        "prompt_tokens_total": 9,
        "generation_tokens_total": 3 + 3 + 5,
        "prefix_cache_queries_total": 7,
        "num_requests_running": 0,
        "num_requests_waiting": 0,
        "kv_cache_usage_perc": 0,
        "num_preemptions_total": 0,
        "prompt_tokens_cached_total": 6,
        "request_success_total[('finished_reason', 'length')]": 2,
        "request_success_total[('finished_reason', 'stop')]": 1,
        "request_success_total[('finished_reason', 'abort')]": 0,
        "request_prefill_kv_computed_tokens_sum": 9 - 6,
        "request_prompt_tokens_count": 3,
        "request_prompt_tokens_sum": 9,
        "request_generation_tokens_sum": 11,
        "request_generation_tokens_bucket[('le', '2.0')]": 0,
        "request_generation_tokens_bucket[('le', '5.0')]": 3,
        "request_generation_tokens_bucket[('le', '+Inf')]": 3,
        "request_params_n_sum": 3,
        "request_params_max_tokens_sum": 3 + 9,
        "request_max_num_generation_tokens_sum": 3 + 5,
        "time_to_first_token_seconds_count": 3,
        "inter_token_latency_seconds_count": 1 + 1 + 2,
        "e2e_request_latency_seconds_count": 3,
        "request_time_per_output_token_seconds_count": 3,
        "cache_config_info[('block_size', '16'), ('num_gpu_blocks', '100')]": 1,
    }
    for name, value in counts.items():
        assert found[f"{prefix}:{name}"] == value, name
    http = {name: value for name, value in found.items() if name.startswith("http_requests_total")}
    path = "('handler', '/v1/completions'), ('method', 'POST')"
    assert http[f"http_requests_total[{path}, ('status', '2xx')]"] == 2
    assert http[f"http_requests_total[{path}, ('status', '4xx')]"] == 1


def test_every_series_names_the_model() -> None:
    text = make_client().get("/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("octavo:")]
    assert lines and all('model_name="fake"' in line and 'engine="0"' in line for line in lines)


@pytest.mark.parametrize("value", [0.0, 1.0, 1.5, 2.0, 2.1, 99.0])
def test_histogram_buckets_are_upper_bounds(value: float) -> None:
    histogram = Histogram((1, 2, 5))
    histogram.observe(value)
    for bound, count in histogram.buckets():
        assert count == (1 if value <= float(bound) else 0), bound
    assert histogram.sum == value


def test_load_falls_back_to_zero() -> None:
    metrics = RequestMetrics()
    timer = metrics.start(2, 3, None)
    assert metrics.in_flight == 1
    timer.finish(4, "stop", 3, 0)
    timer.close()
    timer.close()
    assert metrics.in_flight == 0
    assert metrics.finished == {"stop": 1, "length": 0, "abort": 5}


def walk(node: Any) -> Any:
    yield node
    if isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from walk(child)


def test_openapi_describes_every_route_and_all_references_resolve() -> None:
    client = TestClient(make_app(FakeEngine(), api_keys=("k",)))
    document = client.get("/openapi.json", headers={"authorization": "Bearer k"}).json()
    assert document["openapi"] == "3.1.0"
    for route in route_table():
        operation = document["paths"][route.path.replace(":path", "")][route.method.lower()]
        assert operation["responses"]["4XX"]
        assert ("requestBody" in operation) == (route.body is not None)
        assert ("security" in operation) == (route.path not in ("/health", "/ping"))
    identities = [op["operationId"] for path in document["paths"].values() for op in path.values()]
    assert len(identities) == len(set(identities))
    schemas = document["components"]["schemas"]
    references = [n["$ref"] for n in walk(document) if isinstance(n, dict) and isinstance(n.get("$ref"), str)]
    assert references
    for reference in references:
        assert reference.removeprefix("#/components/schemas/") in schemas, reference


def test_openapi_offers_only_what_works_with_its_ranges() -> None:
    schemas = make_client().get("/openapi.json").json()["components"]["schemas"]
    chat = schemas["ChatCompletionRequest"]
    assert not set(not_yet(ChatCompletionRequest)) & set(chat["properties"])
    assert chat["required"] == ["messages"]
    assert {"type": "integer", "minimum": 1, "maximum": 128} in chat["properties"]["n"]["anyOf"]
    assert chat["additionalProperties"] is False
    assert "anyOf" in schemas["CompletionRequest"]["properties"]["prompt"]


def test_error_formatter() -> None:
    for error, status, kind in (
        (RequestError("No.", "field"), 400, "invalid_request_error"),
        (QueueFullError("Full.", 7), 429, "rate_limit_error"),
        (EngineDeadError("Dead."), 503, "service_unavailable_error"),
        (OutOfMemoryError("Cache of 3 GB."), 500, "server_error"),
        (ValueError("secret"), 500, "server_error"),
    ):
        reply = error_reply(error)
        assert (reply.status, reply.body.type) == (status, kind)
    assert error_reply(QueueFullError("Full.", 7)).headers == {"retry-after": "7"}
    assert "secret" not in error_reply(ValueError("secret")).body.message
    leaky = error_reply(RequestError(f"Bad {object()!r} and 0x7f0011223344.")).body.message
    assert "0x" not in leaky


@pytest.mark.parametrize(
    ("kind", "value", "param"),
    [
        (dict[str, list[int]], {"a": ["x"]}, "[0]"),
        (list[int], ["x"], "[0]"),
        (int, "x", None),
    ],
)
def test_paths_of_validation_errors(kind: Any, value: Any, param: str | None) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(value, kind)
    assert validation_error(caught.value).param == param
    assert error_reply(caught.value).status == 400


def test_options_that_contradict_each_other(tmp_path: Path) -> None:
    for wrong in (
        {"port": -1},
        {"port": 70000},
        {"ssl_keyfile": "k"},
        {"max_body_bytes": 1},
        {"max_header_bytes": 0},
        {"shutdown_timeout": -1.0},
        {"sse_heartbeat": float("nan")},
        {"root_path": "llm"},
    ):
        with pytest.raises(UsageError) as caught:
            ServerSettings.of(ServerOptions(**wrong), ("m",))
        assert next(iter(wrong)).split("_")[0] in str(caught.value).lower()


def test_keys_come_from_flags_and_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("three\n\n four \n")
    options = ServerOptions(api_key=("one", "two"), api_key_file=str(file))
    assert ServerSettings.of(options, ("m",)).api_keys == ("one", "two", "three", "four")
    file.write_text("\n")
    for wrong in (options, ServerOptions(api_key=("",)), ServerOptions(api_key_file=str(tmp_path / "none"))):
        with pytest.raises(UsageError):
            wrong.keys()
