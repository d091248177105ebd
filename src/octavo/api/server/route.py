"""One row of the route table, and what its handler works with."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from octavo.api.openai.context import Context, Stream
from octavo.api.openai.responses.respond import Responses
from octavo.api.server.metrics import RequestMetrics
from octavo.api.server.options import ServerSettings
from octavo.engine.client.base import EngineClient

Reply = msgspec.Struct | Stream | Response


@dataclass(frozen=True)
class Service:
    """What the handlers work with; built once by ``build_app``."""

    context: Context
    client: EngineClient
    settings: ServerSettings
    metrics: RequestMetrics
    responses: Responses


@dataclass(frozen=True)
class Route:
    """One path and method.

    ``body`` is the type of the JSON body (None: no body), ``reply`` and ``chunk`` the types of a whole reply and of a
    stream's events, for the OpenAPI document.
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
