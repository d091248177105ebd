"""One row of the route table, and what its handler works with."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from octavo.api.caller import Caller
from octavo.api.openai.context import Context, Stream
from octavo.api.server.errors import ForbiddenError
from octavo.api.server.metrics import RequestMetrics
from octavo.api.server.options import ServerSettings
from octavo.api.server.shared import Shared
from octavo.engine.client.base import EngineClient

Reply = msgspec.Struct | Stream | Response
TOLD_HEADERS = (b"traceparent", b"tracestate", b"x-request-id")


@dataclass(frozen=True)
class Service:
    """What the handlers work with; built once by ``build_app``."""

    context: Context
    client: EngineClient
    settings: ServerSettings
    metrics: RequestMetrics
    shared: Shared

    def for_caller(self, caller: Caller, route: str, headers: Sequence[tuple[bytes, bytes]]) -> Service:
        """The same, as the owner of a key sees it: with the models the key may use."""
        told = {name.decode(): value.decode("latin-1") for name, value in headers if name in TOLD_HEADERS}
        caller = replace(caller, route=route, headers=told)
        names = self.context.served_model_names
        if caller.models is not None:
            names = tuple(name for name in names if name in caller.models)
            if not names:
                raise ForbiddenError("This key may use none of the models that are served here.")
        context = replace(
            self.context,
            caller=caller,
            served_model_names=names,
            start_timer=partial(self.metrics.start, caller=caller),
        )
        return replace(self, context=context)


@dataclass(frozen=True)
class Route:
    """One path and method.

    ``body`` is the type of the JSON body (None: no body), ``reply`` and ``chunk`` the types of a whole reply and of a
    stream's events, for the OpenAPI document. ``scope`` is what a key must allow ("": any key will do).
    """

    method: str
    path: str
    handler: Callable[[Service, Request, Any], Coroutine[Any, Any, Reply]]
    summary: str
    body: type[msgspec.Struct] | None = None
    reply: type[msgspec.Struct] | None = None
    chunk: type[msgspec.Struct] | None = None
    reply_media_type: str = "application/json"
    stream_media_type: str = "text/event-stream"
    scope: str = "inference"
