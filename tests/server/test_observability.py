"""What operators see of a request: metrics of its phases, timings in its usage, a log line, a span."""

from __future__ import annotations

import gzip
import json
import logging
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_fake import FakeEngine, events_of, make_app, make_client, says
from starlette.testclient import TestClient

from octavo.api.caller import Caller
from octavo.api.server import tracing
from octavo.api.server.metrics import PAGE_AGES, RequestMetrics
from octavo.engine.cache.layout import plan_layout
from octavo.engine.cache.spec import FullKV
from octavo.engine.cache.watch import AGES
from octavo.engine.client.base import Sink
from octavo.engine.core import EngineCore
from octavo.engine.executor.inline import InlineExecutor
from octavo.engine.executor.null import NullRunner
from octavo.engine.settings import EngineSettings
from octavo.errors import UsageError
from octavo.protocol.control import EngineStats
from octavo.protocol.generate import GenerateRequest, SamplingParams, Times, TokenDelta

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "octavo.json"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"


class TimedEngine(FakeEngine):
    """Says with the first delta where the time went."""

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        first = True

        def timed(delta: Any) -> None:
            nonlocal first
            if first:
                delta.times = Times(0.25, 0.5)
            first = False
            sink(delta)

        super().submit(request, timed)


def metrics_of(client: TestClient, prefix: str = "octavo:") -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            name = sample.name.removeprefix(prefix)
            found[name + (f"{sorted(labels.items())}" if labels else "")] = sample.value
    return found


def test_phases_of_a_request_are_measured() -> None:
    client = make_client(TimedEngine(rule=says("abcd", step=2)))
    client.post("/v1/completions", json={"prompt": "xyz", "n": 2, "max_tokens": 3})
    found = metrics_of(client)
    for name, count, total in (
        ("request_queue_time_seconds", 2, 0.5),
        ("request_prefill_time_seconds", 2, 1.0),
        ("request_inference_time_seconds", 2, None),
        ("request_decode_time_seconds", 2, None),
    ):
        assert found[f"{name}_count"] == count
        assert total is None or found[f"{name}_sum"] == total
    assert found["request_inference_time_seconds_sum"] >= 1.0


def test_engine_counters_have_their_labels() -> None:
    engine = FakeEngine()
    engine.stats = EngineStats(
        num_waiting=5,
        num_deferred=2,
        num_prompt_tokens=100,
        num_cached_prompt_tokens=40,
        accepted_at=[7, 3],
        iteration_tokens=[0, 2, 1, 4],
        num_step_tokens=30,
        num_rejected=3,
        num_deadlines=1,
        num_failed=2,
    )
    found = metrics_of(make_client(engine))
    assert found["num_requests_waiting_by_reason[('reason', 'capacity')]"] == 3
    assert found["num_requests_waiting_by_reason[('reason', 'deferred')]"] == 2
    assert found["prompt_tokens_by_source_total[('source', 'local_compute')]"] == 60
    assert found["prompt_tokens_by_source_total[('source', 'local_cache_hit')]"] == 40
    assert found["spec_decode_num_accepted_tokens_per_pos_total[('position', '1')]"] == 3
    assert found["admission_rejections_total"] == 3 and found["request_deadlines_total"] == 1
    assert found["corrupted_requests_total"] == 2
    buckets = {
        bound: found[f"iteration_tokens_total_bucket[('le', '{bound}')]"] for bound in ("1.0", "3.0", "7.0")
    }
    assert buckets == {"1.0": 2, "3.0": 3, "7.0": 7}
    assert found["iteration_tokens_total_count"] == 7 and found["iteration_tokens_total_sum"] == 30


def test_every_name_of_the_dashboard_exists() -> None:
    engine = FakeEngine()
    engine.stats = EngineStats(accepted_at=[1], iteration_tokens=[1])
    text = make_client(engine).get("/metrics").text
    known = set(re.findall(r"^octavo:(\w+?)(?:\{| )", text, re.MULTILINE))
    board = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    used = {name for query in queries for name in re.findall(r"\$\{?prefix\}?:(\w+)", query)}
    assert len(used) > 15 and used <= known, used - known


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_timings_in_the_usage_are_opt_in(stream: bool, route: str) -> None:
    client = make_client(TimedEngine(rule=says("abcd", step=1)))
    body: dict[str, Any] = (
        {"prompt": "x"} if "chat" not in route else {"messages": [{"role": "user", "content": "x"}]}
    )
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}

    def usage(**more: Any) -> dict[str, Any]:
        reply = client.post(route, json={**body, **more})
        found: dict[str, Any] = (events_of(reply.text)[-1] if stream else reply.json())["usage"]
        return found

    assert "timings" not in usage()
    timings = usage(return_timings=True)["timings"]
    assert timings["queue_ms"] == 250 and timings["prefill_ms"] == 500
    assert 0 < timings["first_token_ms"] <= timings["total_ms"]
    assert timings["decode_ms"] > 0 and timings["tokens_per_second"] > 0


@pytest.mark.parametrize("max_log_len", [0, 4])
def test_log_line(caplog: pytest.LogCaptureFixture, max_log_len: int) -> None:
    client = make_client(
        TimedEngine(rule=says("SECRET ANSWER")), enable_log_requests=True, max_log_len=max_log_len
    )
    with caplog.at_level(logging.INFO, "octavo.requests"):
        client.post(
            "/v1/completions",
            json={"prompt": "SECRET prompt", "max_tokens": 5, "temperature": 0.5},
            headers={"x-request-id": "r-1"},
        )
    (line,) = [json.loads(record.message) for record in caplog.records if record.name == "octavo.requests"]
    assert line["route"] == "/v1/completions" and line["prompt_tokens"] == 13
    assert line["completion_tokens"] == 5 and line["finish_reasons"] == ["length"]
    assert line["queue_ms"] == 250 and line["sampling"]["temperature"] == 0.5
    assert line["client_request_id"] == "r-1" and line["request_id"].startswith("cmpl-")
    text = json.dumps(line)
    assert "ANSWER" not in text
    if max_log_len:
        assert line["prompts"] == ["SECR"]
    else:
        assert "SECRET" not in text and "prompts" not in line


def test_no_log_line_without_the_flag(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        make_client().post("/v1/completions", json={"prompt": "SECRET"})
    assert "SECRET" not in caplog.text and not [r for r in caplog.records if r.name == "octavo.requests"]


def test_a_request_that_was_cut_off_is_logged_too() -> None:
    seen = []
    metrics = RequestMetrics()
    metrics.observers.append(lambda timer: seen.append((timer.subject.reasons, timer.caller.name)))
    timer = metrics.start(1, 2, None, Caller(name="team"))
    timer.about("r", [([1, 2], SamplingParams())])
    timer.finish(0, "stop", 2, 0)
    timer.close()
    timer.close()
    assert seen == [(["stop", "abort"], "team")]


def spans(headers: dict[str, str]) -> Any:
    sdk = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = sdk.InMemorySpanExporter()
    observe = tracing.trace_exporter("http://127.0.0.1:9/v1/traces", "fake", exporter)
    metrics = RequestMetrics()
    metrics.observers.append(observe)
    timer = metrics.start(1, 1, 7, Caller(name="team", route="/v1/completions", headers=headers))
    timer.about("cmpl-1", [([1, 2, 3], SamplingParams(max_tokens=7))])
    timer.times(Times(0.25, 0.5))
    timer.delta(0, 1)
    timer.delta(0, 2)
    timer.finish(0, "stop", 3, 1)
    timer.close()
    return exporter.get_finished_spans()


def test_a_span_tells_what_happened_under_the_clients_trace() -> None:
    (span,) = spans({"traceparent": f"00-{TRACE}-{SPAN}-01"})
    assert f"{span.context.trace_id:032x}" == TRACE and f"{span.parent.span_id:016x}" == SPAN
    told = dict(span.attributes)
    assert told["gen_ai.usage.prompt_tokens"] == 3 and told["gen_ai.usage.completion_tokens"] == 3
    assert told["gen_ai.latency.time_in_queue"] == 0.25 and told["octavo.key"] == "team"
    assert told["gen_ai.response.finish_reasons"] == ("stop",) and told["gen_ai.request.max_tokens"] == 7
    assert span.end_time >= span.start_time


@pytest.mark.parametrize(
    "value",
    ["", "00", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"01-{TRACE}-{SPAN}-01", "x" * 5000],
)
def test_a_malformed_traceparent_is_ignored(value: str) -> None:
    (span,) = spans({"traceparent": value})
    assert span.parent is None


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError, match=r"octavo\[otel\]"):
        make_app(FakeEngine(), otlp_traces_endpoint="http://127.0.0.1:9")


class EndingEngine(FakeEngine):
    """Ends every request with ``reason`` after two steps."""

    reason: Any = "deadline"

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        def cut(delta: TokenDelta) -> None:
            running = self.running.get(request.id)
            if running is not None and running.num_tokens > 2:
                delta = TokenDelta(request.id, [], self.reason, None, "It waited too long.")
                del self.running[request.id]
            sink(delta)

        super().submit(request, cut)


def test_a_deadline_is_a_finish_reason_with_what_there_is() -> None:
    client = make_client(EndingEngine(rule=says("abcdef", step=1)))
    reply = client.post("/v1/completions", json={"prompt": "x", "deadline_ms": 5})
    assert reply.status_code == 200
    choice = reply.json()["choices"][0]
    assert choice["text"] == "ab" and choice["finish_reason"] == "deadline"
    chat = {"messages": [{"role": "user", "content": "x"}], "stream": True, "deadline_ms": 5}
    events = events_of(client.post("/v1/chat/completions", json=chat).text)
    assert events[-1]["choices"][0]["finish_reason"] == "deadline"
    assert metrics_of(client)["request_success_total[('finished_reason', 'deadline')]"] == 2


def test_a_rejection_is_a_429_that_says_when_to_come_back() -> None:
    engine = EndingEngine(rule=says("abcdef", step=1))
    engine.reason = "rejected"
    reply = make_client(engine).post("/v1/completions", json={"prompt": "x", "n": 2, "max_queue_ms": 5})
    assert reply.status_code == 429 and "waited too long" in reply.json()["error"]["message"]
    assert int(reply.headers["retry-after"]) >= 1
    assert not engine.running


def test_limits_of_time_reach_the_engine() -> None:
    engine = FakeEngine(rule=says("ab"))
    make_client(engine).post("/v1/completions", json={"prompt": "x", "deadline_ms": 5, "max_queue_ms": 7})
    assert engine.submitted[-1].terms.deadline_ms == 5 and engine.submitted[-1].terms.max_queue_ms == 7


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_spans_arrive_at_a_collector() -> None:
    """The whole way over OTLP/HTTP, to a collector that keeps what it gets."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            bodies.append(gzip.decompress(raw) if self.headers.get("content-encoding") == "gzip" else raw)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever, daemon=True)
        thread.start()
        observe = tracing.trace_exporter(f"http://127.0.0.1:{collector.server_port}/v1/traces", "fake")
        metrics = RequestMetrics()
        metrics.observers.append(observe)
        timer = metrics.start(1, 1, None, Caller(headers={"traceparent": f"00-{TRACE}-{SPAN}-01"}))
        timer.about("cmpl-7", [([1, 2], SamplingParams())])
        timer.close()
        assert isinstance(observe, tracing.Spans)
        observe.close()
        collector.shutdown()
        thread.join(10)
    sent = ExportTraceServiceRequest.FromString(bodies[0])
    (span,) = sent.resource_spans[0].scope_spans[0].spans
    assert span.name == "llm_request" and span.trace_id.hex() == TRACE and span.parent_span_id.hex() == SPAN
    told = {attribute.key: attribute.value for attribute in span.attributes}
    assert told["gen_ai.request.id"].string_value == "cmpl-7"


# Names of vLLM 0.21 that stand for what is not here.
NOT_HERE = {
    "engine_sleep_state": "there is no sleep mode",
    "lora_requests_info": "there are no adapters",
    "external_prefix_cache_queries_total": "there are no connectors",
    "external_prefix_cache_hits_total": "there are no connectors",
    "mm_cache_queries_total": "there are no media",
    "mm_cache_hits_total": "there are no media",
    "estimated_flops_per_gpu_total": "--enable-mfu-metrics is not served",
    "estimated_read_bytes_per_gpu_total": "--enable-mfu-metrics is not served",
    "estimated_write_bytes_per_gpu_total": "--enable-mfu-metrics is not served",
}
VLLM_NAMES = """
num_requests_running num_requests_waiting num_requests_waiting_by_reason kv_cache_usage_perc engine_sleep_state
lora_requests_info cache_config_info estimated_flops_per_gpu_total estimated_read_bytes_per_gpu_total
estimated_write_bytes_per_gpu_total prefix_cache_queries_total prefix_cache_hits_total
external_prefix_cache_queries_total external_prefix_cache_hits_total mm_cache_queries_total mm_cache_hits_total
num_preemptions_total prompt_tokens_total prompt_tokens_by_source_total prompt_tokens_cached_total
generation_tokens_total request_success_total corrupted_requests_total spec_decode_num_drafts_total
spec_decode_num_draft_tokens_total spec_decode_num_accepted_tokens_total
spec_decode_num_accepted_tokens_per_pos_total request_prompt_tokens request_generation_tokens iteration_tokens_total
request_max_num_generation_tokens request_params_n request_params_max_tokens time_to_first_token_seconds
inter_token_latency_seconds request_time_per_output_token_seconds e2e_request_latency_seconds
request_queue_time_seconds request_inference_time_seconds request_prefill_time_seconds request_decode_time_seconds
request_prefill_kv_computed_tokens kv_block_lifetime_seconds kv_block_idle_before_evict_seconds
kv_block_reuse_gap_seconds
"""


def test_vllms_names_are_all_there_or_stand_for_what_is_not_here() -> None:
    engine = FakeEngine()
    ages = [1.0] * (len(AGES) + 2)
    engine.stats = EngineStats(
        accepted_at=[1], iteration_tokens=[1], page_lifetimes=ages, page_idles=ages, page_gaps=ages
    )
    client = make_client(engine, metrics_prefix="vllm")
    text = client.get("/metrics").text
    shown = set(re.findall(r"^vllm:(\w+?)(?:_bucket|_sum|_count)?(?:\{| )", text, re.MULTILINE))
    assert set(VLLM_NAMES.split()) - shown == set(NOT_HERE)
    assert PAGE_AGES == AGES
    assert metrics_of(client, "vllm:")["kv_block_lifetime_seconds_count"] == len(AGES) + 1


def test_http_requests_are_timed() -> None:
    client = make_client()
    client.get("/v1/models")
    client.get("/v1/models/other")
    found = metrics_of(client)
    labels = "[('handler', '/v1/models'), ('method', 'GET')]"
    assert found[f"http_request_duration_seconds_count{labels}"] == 1
    assert 0 < found[f"http_request_duration_seconds_sum{labels}"] < 10


def test_ages_of_pages_are_measured_where_asked() -> None:
    now = 0.0
    settings = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 64, "vocab_size": 100}
    runner = NullRunner(plan_layout({0: FullKV(16, 1)}), num_pages=4, num_slots=4, vocab_size=100)
    core = EngineCore(
        InlineExecutor(runner), EngineSettings(**settings, watched_pages=1.0), clock=lambda: now
    )

    def ask(prompt: list[int]) -> None:
        request = GenerateRequest(
            id=len(asked), prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=1, ignore_eos=True)
        )
        asked.append(prompt)
        core.submit(request)
        while core.has_work:
            core.step()

    asked: list[list[int]] = []
    first, other = list(range(33)), list(range(50, 99))
    ask(first)
    now = 3.0
    ask(first)  # finds two pages again
    now = 10.0
    ask(other)  # needs all four
    stats = core.stats()
    assert stats.page_gaps[-1] == 6.0 and sum(stats.page_gaps[:-1]) == 2
    assert stats.page_lifetimes[-1] == 20.0 and stats.page_idles[-1] == 14.0
    assert stats.page_lifetimes[AGES.index(10.0)] == 2 and stats.page_idles[AGES.index(10.0)] == 2
    assert EngineCore(InlineExecutor(runner), EngineSettings(**settings)).stats().page_gaps == []
