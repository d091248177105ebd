"""``--enable-log-requests``: one JSON line for every generation request that is over; no text unless it is asked for."""

from __future__ import annotations

import logging

import msgspec

from octavo.api.server.metrics import RequestTimer, milliseconds
from octavo.api.text.tokenizer import Tokenizer

log = logging.getLogger("octavo.requests")
SHOWN = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "n", "seed")


class RequestLog:
    """An observer of ``RequestMetrics``; ``max_chars`` of each prompt are shown (0: none)."""

    def __init__(self, tokenizer: Tokenizer, max_chars: int) -> None:
        self.tokenizer = tokenizer
        self.max_chars = max_chars
        self._encode = msgspec.json.Encoder(order="deterministic").encode

    def __call__(self, timer: RequestTimer) -> None:
        """Log a request."""
        log.info("%s", self._encode(self.record(timer)).decode())

    def record(self, timer: RequestTimer) -> dict[str, object]:
        """What a line says; times in milliseconds."""
        subject, sampling = timer.subject, timer.subject.sampling
        record: dict[str, object] = {
            "time": round(timer.arrival_wall_s, 3),
            "request_id": subject.request_id,
            "route": timer.caller.route,
            "key": timer.caller.name,
            "prompt_tokens": sum(map(len, subject.prompts)),
            "cached_tokens": subject.num_cached,
            "completion_tokens": sum(timer.tokens),
            "finish_reasons": subject.reasons,
            "total_ms": milliseconds(timer.total_s),
            "first_token_ms": milliseconds(timer.first_token_s),
            "queue_ms": milliseconds(timer.queue_s),
            "prefill_ms": milliseconds(timer.prefill_s),
            "decode_ms": milliseconds(timer.decode_s),
        }
        if sampling is not None:
            record["sampling"] = {name: getattr(sampling, name) for name in SHOWN}
            record["structured"] = sampling.structured_outputs is not None
        if "x-request-id" in timer.caller.headers:
            record["client_request_id"] = timer.caller.headers["x-request-id"][:256]
        if self.max_chars:
            ids = [list(prompt[: self.max_chars]) for prompt in subject.prompts]
            record["prompts"] = [
                self.tokenizer.decode(some, skip_special_tokens=False)[: self.max_chars] for some in ids
            ]
        return record
