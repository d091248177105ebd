"""Prometheus metrics under vLLM's names: gauges and counters of the engine, timings of the requests.

Timings are gathered in plain lists (a bisect and two additions a token) and become metric families only when the
page is scraped. The prefix is ``octavo:`` or, for dashboards that exist, ``vllm:``.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from octavo.api.caller import ANYBODY, Caller
from octavo.api.openai.schema import Timings
from octavo.api.server.fronts.messages import Counts
from octavo.protocol.control import EngineInfo, EngineStats
from octavo.protocol.generate import SamplingParams, Times

TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)
COUNT_BUCKETS = (1, 2, 5, 10, 20)
FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_LATENCY_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
HTTP_BUCKETS = (0.01, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0)
# Those that the engine counts by (engine/cache/watch.py).
PAGE_AGES = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
    *(10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0),
)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Counts by upper bound and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count ``value`` in the first bucket whose bound is not below it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by bound, ``+Inf`` last."""
        rows, running = [], 0
        for bound, count in zip((*map(str, map(float, self.bounds)), "+Inf"), self.counts):
            running += count
            rows.append((bound, float(running)))
        return rows


class RequestMetrics:
    """What the front half counts itself; one instance a process."""

    def __init__(self) -> None:
        self.histograms = {
            "request_prompt_tokens": Histogram(TOKEN_BUCKETS),
            "request_generation_tokens": Histogram(TOKEN_BUCKETS),
            "request_max_num_generation_tokens": Histogram(TOKEN_BUCKETS),
            "request_params_max_tokens": Histogram(TOKEN_BUCKETS),
            "request_params_n": Histogram(COUNT_BUCKETS),
            "time_to_first_token_seconds": Histogram(FIRST_TOKEN_BUCKETS),
            "inter_token_latency_seconds": Histogram(TOKEN_LATENCY_BUCKETS),
            "request_time_per_output_token_seconds": Histogram(TOKEN_LATENCY_BUCKETS),
            "request_prefill_kv_computed_tokens": Histogram(TOKEN_BUCKETS),
            "request_queue_time_seconds": Histogram(REQUEST_BUCKETS),
            "request_prefill_time_seconds": Histogram(REQUEST_BUCKETS),
            "request_decode_time_seconds": Histogram(REQUEST_BUCKETS),
            "request_inference_time_seconds": Histogram(REQUEST_BUCKETS),
            "e2e_request_latency_seconds": Histogram(REQUEST_BUCKETS),
        }
        self.finished: Counter[str] = Counter(
            {"stop": 0, "length": 0, "abort": 0}
        )  # series exist from the start
        self.http: Counter[tuple[str, str, str]] = Counter()  # method, route, status class
        self.http_seconds: dict[tuple[str, str], Histogram] = {}  # method, route
        self.prompt_tokens_cached = 0
        self.by_key: Counter[tuple[str, str]] = Counter()  # name of the key, what is counted
        self.in_flight = 0
        self.observers: list[Callable[[RequestTimer], None]] = []  # told of every request that is over

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """An HTTP request was answered, to the end."""
        self.http[method, route, f"{status // 100}xx"] += 1
        if (method, route) not in self.http_seconds:
            self.http_seconds[method, route] = Histogram(HTTP_BUCKETS)
        self.http_seconds[method, route].observe(seconds)

    def start(
        self, num_prompts: int, n: int, max_tokens: int | None, caller: Caller = ANYBODY
    ) -> RequestTimer:
        """A request of ``num_prompts`` prompts with ``n`` choices each begins."""
        self.histograms["request_params_n"].observe(n)
        if max_tokens is not None:
            self.histograms["request_params_max_tokens"].observe(max_tokens)
        self.in_flight += 1
        return RequestTimer(self, num_prompts * n, caller)

    def counts(self) -> Counts:
        """Everything, for another process."""
        return Counts(
            histograms={name: (found.counts, found.sum) for name, found in self.histograms.items()},
            finished=dict(self.finished),
            http=[(*key, count) for key, count in self.http.items()],
            http_seconds=[(*key, found.counts, found.sum) for key, found in self.http_seconds.items()],
            by_key=[(*key, count) for key, count in self.by_key.items()],
            prompt_tokens_cached=self.prompt_tokens_cached,
            in_flight=self.in_flight,
        )

    def add(self, counts: Counts) -> None:
        """Count what another process has counted."""
        for name, (numbers, total) in counts.histograms.items():
            mine = self.histograms[name]
            mine.counts = [old + new for old, new in zip(mine.counts, numbers, strict=True)]
            mine.sum += total
        self.finished.update(counts.finished)
        self.http.update({(method, route, status): count for method, route, status, count in counts.http})
        for method, route, numbers, total in counts.http_seconds:
            timed = self.http_seconds.setdefault((method, route), Histogram(HTTP_BUCKETS))
            timed.counts = [old + new for old, new in zip(timed.counts, numbers, strict=True)]
            timed.sum += total
        self.by_key.update({(key, what): count for key, what, count in counts.by_key})
        self.prompt_tokens_cached += counts.prompt_tokens_cached
        self.in_flight += counts.in_flight


@dataclass
class Subject:
    """What a request is about, for logs and traces; ``prompts`` are token ids."""

    request_id: str = ""
    prompts: Sequence[Sequence[int]] = ()
    sampling: SamplingParams | None = None
    num_cached: int = 0
    reasons: list[str] = field(default_factory=list)


class RequestTimer:
    """Follows the choices of one request from arrival to the end."""

    def __init__(self, metrics: RequestMetrics, num_choices: int, caller: Caller = ANYBODY) -> None:
        self.metrics = metrics
        self.caller = caller
        self.subject = Subject()
        self.queue_s: float | None = None  # of the choice that came first
        self.prefill_s: float | None = None
        self.arrival_wall_s = time.time()
        self.arrival = time.perf_counter()
        self.ended = self.arrival
        self.first = [0.0] * num_choices
        self.last = [0.0] * num_choices
        self.tokens = [0] * num_choices
        self.num_open = num_choices
        self.closed = False
        self.first_token = metrics.histograms["time_to_first_token_seconds"].observe
        self.between_tokens = metrics.histograms["inter_token_latency_seconds"].observe
        self._queued = metrics.histograms["request_queue_time_seconds"]
        self._prefilled = metrics.histograms["request_prefill_time_seconds"]

    def about(self, request_id: str, prompts: Sequence[tuple[list[int], SamplingParams]]) -> None:
        """What the request is; ``prompts`` with their parameters."""
        self.subject = Subject(request_id, [ids for ids, _ in prompts], prompts[0][1])

    def times(self, times: Times) -> None:
        """A choice has its first token; the engine says where the time until then went."""
        self._queued.observe(times.queue_s)
        self._prefilled.observe(times.prefill_s)
        if self.queue_s is None:
            self.queue_s, self.prefill_s = times.queue_s, times.prefill_s

    def delta(self, choice: int, num_tokens: int) -> None:
        """``num_tokens`` more tokens of ``choice`` have arrived now."""
        if not num_tokens:
            return
        now = time.perf_counter()
        last = self.last[choice]
        if last:
            self.between_tokens(now - last)
        else:
            self.first[choice] = now
            self.first_token(now - self.arrival)
        self.last[choice] = now
        self.tokens[choice] += num_tokens

    def finish(self, choice: int, reason: str, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """``choice`` has ended for ``reason``."""
        now = time.perf_counter()
        metrics, count = self.metrics, self.tokens[choice]
        metrics.finished[reason] += 1
        self.subject.reasons.append(reason)
        self.subject.num_cached += num_cached_tokens
        self.num_open -= 1
        metrics.prompt_tokens_cached += num_cached_tokens
        histograms = metrics.histograms
        histograms["request_prompt_tokens"].observe(num_prompt_tokens)
        histograms["request_prefill_kv_computed_tokens"].observe(num_prompt_tokens - num_cached_tokens)
        histograms["request_generation_tokens"].observe(count)
        histograms["e2e_request_latency_seconds"].observe(now - self.arrival)
        decode = self.last[choice] - self.first[choice]
        histograms["request_decode_time_seconds"].observe(decode)
        histograms["request_inference_time_seconds"].observe(decode + (self.prefill_s or 0.0))
        if count > 1:
            histograms["request_time_per_output_token_seconds"].observe(decode / (count - 1))

    def close(self) -> None:
        """The request is over, however it ended; choices without an end count as aborted. Safe to call twice."""
        if not self.closed:
            self.closed = True
            self.ended = time.perf_counter()
            self.metrics.in_flight -= 1
            self.metrics.finished["abort"] += self.num_open
            self.subject.reasons += ["abort"] * self.num_open
            self.metrics.histograms["request_max_num_generation_tokens"].observe(max(self.tokens, default=0))
            if self.caller.name:
                count = self.metrics.by_key
                count[self.caller.name, "requests"] += 1
                count[self.caller.name, "prompt_tokens"] += sum(map(len, self.subject.prompts))
                count[self.caller.name, "generation_tokens"] += sum(self.tokens)
            for observe in self.metrics.observers:
                observe(self)

    @property
    def first_token_s(self) -> float | None:
        """From arrival to the first token of any choice."""
        firsts = [first for first in self.first if first]
        return min(firsts) - self.arrival if firsts else None

    @property
    def decode_s(self) -> float:
        """From the first token to the last."""
        firsts = [first for first in self.first if first]
        return max(self.last) - min(firsts) if firsts else 0.0

    @property
    def total_s(self) -> float:
        """From arrival until now, or to the end."""
        return (self.ended if self.closed else time.perf_counter()) - self.arrival

    def timings(self) -> Timings:
        """Where the time went so far, for the usage of a reply."""
        decode_s, num_tokens = self.decode_s, sum(self.tokens) - sum(map(bool, self.tokens))
        return Timings(
            queue_ms=milliseconds(self.queue_s),
            prefill_ms=milliseconds(self.prefill_s),
            first_token_ms=milliseconds(self.first_token_s),
            decode_ms=milliseconds(decode_s),
            total_ms=milliseconds(self.total_s),
            tokens_per_second=round(num_tokens / decode_s, 2) if decode_s > 0 else None,
        )


def milliseconds(seconds: float | None) -> float | None:
    """To the microsecond; None stays None."""
    return None if seconds is None else round(seconds * 1e3, 3)


COUNTERS = {
    "num_preemptions": ("num_preemptions", "Sequences that lost their pages and were computed again."),
    "prompt_tokens": ("num_prompt_tokens", "Prompt tokens computed."),
    "generation_tokens": ("num_generation_tokens", "Tokens generated."),
    "prefix_cache_queries": ("prefix_cache_queries", "Tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("prefix_cache_hits", "Tokens found in the prefix cache."),
    "spec_decode_num_drafts": ("num_drafts", "Drafts verified."),
    "spec_decode_num_draft_tokens": ("num_draft_tokens", "Draft tokens verified."),
    "spec_decode_num_accepted_tokens": ("num_accepted_tokens", "Draft tokens accepted."),
    "admission_rejections": (
        "num_rejected",
        "Requests given up before they began: a full queue, or too late.",
    ),
    "request_deadlines": ("num_deadlines", "Requests ended by their deadline."),
    "corrupted_requests": ("num_failed", "Requests that failed alone, for example by NaN logits."),
}
GAUGES = {
    "num_requests_running": ("num_running", "Sequences in the running batch."),
    "num_requests_waiting": ("num_waiting", "Sequences in the queue."),
    "kv_cache_usage_perc": ("kv_cache_usage", "Share of the KV cache in use; 1 is all of it."),
}


class _Snapshot(Collector):
    """The metric families of one scrape."""

    def __init__(
        self, requests: RequestMetrics, info: EngineInfo, stats: EngineStats | None, prefix: str, model: str
    ) -> None:
        self.requests, self.info, self.stats, self.prefix = requests, info, stats, prefix
        self.labels = ["model_name", "engine"]
        self.values = [model, "0"]

    def collect(self) -> Iterator[Metric]:
        if self.stats is not None:
            for name, (source, text) in GAUGES.items():
                gauge = GaugeMetricFamily(f"{self.prefix}:{name}", text, labels=self.labels)
                gauge.add_metric(self.values, getattr(self.stats, source))
                yield gauge
            for name, (source, text) in COUNTERS.items():
                yield self._counter(name, text, {(): getattr(self.stats, source)})
            yield from self._engine(self.stats)
        yield self._counter(
            "prompt_tokens_cached",
            "Prompt tokens taken from the cache.",
            {(): self.requests.prompt_tokens_cached},
        )
        finished: dict[tuple[str, ...], float] = {
            (reason,): count for reason, count in self.requests.finished.items()
        }
        yield self._counter("request_success", "Requests that ended.", finished, ["finished_reason"])
        for what in ("requests", "prompt_tokens", "generation_tokens"):
            counts: dict[tuple[str, ...], float] = {
                (key,): count for (key, kind), count in self.requests.by_key.items() if kind == what
            }
            text = f"{what.replace('_', ' ').capitalize()} of each named key."
            yield self._counter(f"key_{what}", text, counts, ["key"])
        for name, histogram in self.requests.histograms.items():
            family = HistogramMetricFamily(
                f"{self.prefix}:{name}", name.replace("_", " "), labels=self.labels
            )
            family.add_metric(self.values, histogram.buckets(), histogram.sum)
            yield family
        config = GaugeMetricFamily(
            f"{self.prefix}:cache_config_info",
            "Shape of the KV cache.",
            labels=[*self.labels, "block_size", "num_gpu_blocks"],
        )
        config.add_metric([*self.values, str(self.info.page_size), str(self.info.num_pages)], 1)
        yield config
        http = CounterMetricFamily("http_requests", "HTTP requests.", labels=["method", "handler", "status"])
        for key, count in self.requests.http.items():
            http.add_metric(list(key), count)
        yield http
        timed = HistogramMetricFamily(
            "http_request_duration_seconds",
            "From a request's head to its last byte.",
            labels=["method", "handler"],
        )
        for route, histogram in self.requests.http_seconds.items():
            timed.add_metric(list(route), histogram.buckets(), histogram.sum)
        yield timed

    def _engine(self, stats: EngineStats) -> Iterator[Metric]:
        """What of the engine's numbers has labels of its own."""
        waiting = GaugeMetricFamily(
            f"{self.prefix}:num_requests_waiting_by_reason",
            "Sequences in the queue, by what they wait for.",
            labels=[*self.labels, "reason"],
        )
        waiting.add_metric([*self.values, "capacity"], stats.num_waiting - stats.num_deferred)
        waiting.add_metric([*self.values, "deferred"], stats.num_deferred)
        yield waiting
        cached = stats.num_cached_prompt_tokens
        yield self._counter(
            "prompt_tokens_by_source",
            "Prompt tokens, by where their keys and values came from.",
            {("local_compute",): stats.num_prompt_tokens - cached, ("local_cache_hit",): cached},
            ["source"],
        )
        accepted: dict[tuple[str, ...], float] = {
            (str(place),): count for place, count in enumerate(stats.accepted_at)
        }
        yield self._counter(
            "spec_decode_num_accepted_tokens_per_pos", "Drafts accepted, by place.", accepted, ["position"]
        )
        iterations = HistogramMetricFamily(
            f"{self.prefix}:iteration_tokens_total", "Tokens of a step.", labels=self.labels
        )
        running, buckets = 0, []
        for place, count in enumerate(stats.iteration_tokens):
            running += count
            buckets.append((str(float(2**place - 1)), float(running)))
        buckets.append(("+Inf", float(running)))
        iterations.add_metric(self.values, buckets, float(stats.num_step_tokens))
        yield iterations
        for name, ages in (
            ("kv_block_lifetime_seconds", stats.page_lifetimes),
            ("kv_block_idle_before_evict_seconds", stats.page_idles),
            ("kv_block_reuse_gap_seconds", stats.page_gaps),
        ):
            if ages:
                yield self._ages(name, ages)

    def _ages(self, name: str, ages: list[float]) -> Metric:
        """Ages of cached pages, as the engine counts them."""
        text = f"{name.replace('_', ' ').removeprefix('kv ')} of a sample of pages."
        family = HistogramMetricFamily(f"{self.prefix}:{name}", text.capitalize(), labels=self.labels)
        bounds = [*map(str, PAGE_AGES), "+Inf"]
        family.add_metric(self.values, list(zip(bounds, accumulate(ages[:-1]))), ages[-1])
        return family

    def _counter(
        self, name: str, text: str, values: dict[tuple[str, ...], float], labels: Sequence[str] = ()
    ) -> Metric:
        family = CounterMetricFamily(f"{self.prefix}:{name}", text, labels=[*self.labels, *labels])
        for extra, value in values.items():
            family.add_metric([*self.values, *extra], value)
        return family


def render(
    requests: RequestMetrics, info: EngineInfo, stats: EngineStats | None, *, prefix: str, model: str
) -> bytes:
    """The metrics page in Prometheus' text format; without ``stats`` (a dead engine) the engine's part is left out."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(requests, info, stats, prefix, model))
    return generate_latest(registry)
