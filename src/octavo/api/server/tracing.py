"""``--otlp-traces-endpoint``: a span for every generation request, under the client's own trace where it sent one.

Attributes are those of OpenTelemetry's conventions for generative AI, times are in seconds. The libraries come with the
extra ``octavo[otel]``; nothing is imported without the flag.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from octavo.api.server.metrics import RequestTimer
from octavo.errors import UsageError

# W3C Trace Context, version 00: trace id, parent id, flags; ids of zeros are invalid.
TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")


def trace_exporter(endpoint: str, model: str, exporter: Any = None) -> Spans:
    """An observer of ``RequestMetrics`` that sends spans to ``endpoint`` in batches, from a thread.

    ``exporter`` replaces the OTLP one. Raises ``UsageError`` where the libraries are missing.
    """
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            processor: Any = BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint))
        else:
            processor = SimpleSpanProcessor(exporter)
    except ImportError:
        raise UsageError(
            "--otlp-traces-endpoint needs OpenTelemetry.", "Install it with pip install 'octavo[otel]'."
        ) from None
    provider = TracerProvider(resource=Resource.create({"service.name": "octavo"}))
    provider.add_span_processor(processor)
    return Spans(provider, model)


class Spans:
    """Makes one span a request, after the fact. What is not sent yet goes out when the process ends, or at ``close``."""

    def __init__(self, provider: Any, model: str) -> None:
        self.provider = provider
        self.tracer = provider.get_tracer("octavo")
        self.model = model

    def close(self) -> None:
        """Send what is left and stop the thread."""
        self.provider.shutdown()

    def __call__(self, timer: RequestTimer) -> None:
        """Record a request that is over."""
        from opentelemetry.trace import SpanKind

        begin = int(timer.arrival_wall_s * 1e9)
        span = self.tracer.start_span(
            "llm_request",
            context=parent(timer.caller.headers),
            kind=SpanKind.SERVER,
            start_time=begin,
            attributes=attributes(timer, self.model),
        )
        span.end(end_time=begin + int(timer.total_s * 1e9))


def attributes(timer: RequestTimer, model: str) -> dict[str, Any]:
    """What a span says of a request."""
    subject, sampling = timer.subject, timer.subject.sampling
    found: dict[str, Any] = {
        "gen_ai.response.model": model,
        "gen_ai.request.id": subject.request_id,
        "gen_ai.usage.prompt_tokens": sum(map(len, subject.prompts)),
        "gen_ai.usage.cached_tokens": subject.num_cached,
        "gen_ai.usage.completion_tokens": sum(timer.tokens),
        "gen_ai.response.finish_reasons": subject.reasons,
        "gen_ai.latency.e2e": timer.total_s,
        "gen_ai.latency.time_to_first_token": timer.first_token_s,
        "gen_ai.latency.time_in_queue": timer.queue_s,
        "gen_ai.latency.time_in_model_prefill": timer.prefill_s,
        "gen_ai.latency.time_in_model_decode": timer.decode_s,
        "http.route": timer.caller.route,
        "octavo.key": timer.caller.name,
    }
    if sampling is not None:
        found["gen_ai.request.temperature"] = sampling.temperature
        found["gen_ai.request.top_p"] = sampling.top_p
        found["gen_ai.request.max_tokens"] = sampling.max_tokens
        found["gen_ai.request.n"] = sampling.n
    return {name: value for name, value in found.items() if value is not None}


def parent(headers: Mapping[str, str]) -> Any:
    """The context of the client's span (W3C traceparent); None where there is none or it is malformed."""
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    match = TRACEPARENT.fullmatch(headers.get("traceparent", "").strip())
    if match is None:
        return None
    context = SpanContext(int(match[1], 16), int(match[2], 16), True, TraceFlags(int(match[3], 16)))
    return set_span_in_context(NonRecordingSpan(context))
