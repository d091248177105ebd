"""What the handlers of a dialect get to work with; built once by the app."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from octavo.api.caller import ANYBODY, Caller
from octavo.api.chat.given import GivenTemplates
from octavo.api.frontend import Frontend
from octavo.api.openai.schema import Timings
from octavo.errors import RequestError
from octavo.protocol.control import EngineInfo
from octavo.protocol.generate import SamplingParams, Terms, Times


class ModelNotServedError(RequestError):
    """The request names a model that this server does not have (HTTP 404)."""

    status = 404
    code = "model_not_found"


class Timer(Protocol):
    """Follows the choices of one request for metrics, logs and traces."""

    def about(self, request_id: str, prompts: Sequence[tuple[list[int], SamplingParams]]) -> None:
        """What the request is."""

    def times(self, times: Times) -> None:
        """A choice has its first token."""

    def delta(self, choice: int, num_tokens: int) -> None:
        """More tokens of a choice have arrived."""

    def finish(self, choice: int, reason: str, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """A choice has ended."""

    def close(self) -> None:
        """The request is over, however it ended."""

    def timings(self) -> Timings:
        """Where the time went so far."""


@dataclass(frozen=True)
class Context:
    """One served model, as one caller sees it.

    ``start_timer(num_prompts, n, max_tokens)`` begins the timing of a request. ``created_s`` is the wall clock time
    at which the server began to serve the model.
    """

    frontend: Frontend
    info: EngineInfo
    served_model_names: tuple[str, ...]
    start_timer: Callable[[int, int, int | None], Timer]
    version: str
    templates: GivenTemplates
    created_s: int = field(default_factory=lambda: int(time.time()))
    caller: Caller = ANYBODY

    @cached_property
    def fingerprint(self) -> str:
        """``system_fingerprint``: changes when the same request could be answered differently."""
        info = self.info
        text = f"{self.version} {info.model} {info.architecture} {info.dtype} {info.device}"
        return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:12]

    def terms(self, deadline_ms: int | None, max_queue_ms: int | None) -> Terms:
        """The caller's share, and how long a request may take."""
        return Terms(
            tenant=self.caller.name,
            weight=self.caller.weight,
            deadline_ms=deadline_ms,
            max_queue_ms=max_queue_ms,
        )

    def check_model(self, name: str | None) -> str:
        """The name for the reply; ``ModelNotServedError`` for a name that is not served."""
        if name is None or name in self.served_model_names:
            return name or self.served_model_names[0]
        raise ModelNotServedError(
            f"The model {name!r} is not served here.",
            param="model",
            cure=f"Use one of: {', '.join(self.served_model_names)}.",
        )


@dataclass(frozen=True)
class StreamForm:
    """How a dialect frames a stream: what it sends while it waits, at the end, and around an encoded error."""

    media_type: str = "text/event-stream; charset=utf-8"
    heartbeat: bytes = b": waiting\n\n"  # a comment line: clients skip it, proxies see a live connection
    done: bytes = b"data: [DONE]\n\n"
    error_head: bytes = b"data: "
    error_tail: bytes = b"\n\n"


SSE = StreamForm()


@dataclass(frozen=True)
class Stream:
    """A reply in parts: encoded events, and what to call when they are not wanted any more (or never were)."""

    events: AsyncGenerator[bytes, None]
    close: Callable[[], None]
    form: StreamForm = SSE


def reply_id(prefix: str, request_id: str | None) -> str:
    """The id of a reply: the client's own request id behind the prefix, or a random one."""
    return f"{prefix}{request_id or uuid.uuid4().hex}"
