"""The HTTP application: every route of the one table behind the same limits, authentication and error formatter."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from octavo import __version__
from octavo.api.chat.given import GivenTemplates
from octavo.api.frontend import Frontend
from octavo.api.openai.context import Context, Stream
from octavo.api.server.auth import BearerAuth, route_path
from octavo.api.server.body import BodyDecoder, check_media_type, read_body
from octavo.api.server.errors import (
    ClientGoneError,
    ForbiddenError,
    ShuttingDownError,
    dialect_of,
    error_reply,
)
from octavo.api.server.hosts import HostCheck
from octavo.api.server.keys import Caps, KeyRing, caller_of
from octavo.api.server.limits import BodyLimit
from octavo.api.server.openapi import document
from octavo.api.server.options import ServerSettings
from octavo.api.server.request_log import RequestLog
from octavo.api.server.route import Reply, Route, Service
from octavo.api.server.routes import route_table
from octavo.api.server.shared import Own, Shared
from octavo.api.server.sse import EventStream, until_disconnect
from octavo.api.server.tracing import trace_exporter
from octavo.engine.client.base import EngineClient
from octavo.errors import is_panic

log = logging.getLogger("octavo.server")


class Endpoint:
    """One route as an ASGI app: reads and decodes the body, calls the handler, sends the reply or the error."""

    def __init__(self, service: Service, route: Route) -> None:
        self.service = service
        self.route = route
        self.uncapped = Caps()
        self.decoder: BodyDecoder[Any] | None = None
        if route.body is not None:
            ignore = service.settings.ignore_unknown_fields
            self.decoder = BodyDecoder(route.body, ignore_unknown=ignore)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begin = time.perf_counter()
        try:
            service, caps = self._admit(scope)
            async with caps.one():
                response = await self._respond(service, Request(scope, receive))
                await response(scope, receive, send)
            self._count(response.status_code, begin)
        except ClientGoneError:
            return
        except asyncio.CancelledError:  # only a shutdown cancels a connection
            error = ShuttingDownError("The server is shutting down.", "Send the request again.")
            await self._fail(error, begin, scope, receive, send)
        except BaseException as error:  # the one place where every failure becomes a reply
            if not (isinstance(error, Exception) or is_panic(error)):
                raise
            await self._fail(error, begin, scope, receive, send)

    async def _fail(
        self, error: BaseException, begin: float, scope: Scope, receive: Receive, send: Send
    ) -> None:
        reply = error_reply(error)
        self._count(reply.status, begin)
        await reply.response(dialect_of(self.route.path))(scope, receive, send)

    def _count(self, status: int, begin: float) -> None:
        seconds = time.perf_counter() - begin
        self.service.metrics.answered(self.route.method, self.route.path, status, seconds)

    def _admit(self, scope: Scope) -> tuple[Service, Caps]:
        """What this caller may work with; ``ForbiddenError`` where the key does not open this route."""
        caller, caps = caller_of(scope)
        needed = self.route.scope
        if needed and needed not in caller.scopes:
            cure = "Start the server with --admin-api-key and send that key." if needed == "admin" else None
            raise ForbiddenError(f"This needs a key with the scope {needed!r}.", cure=cure)
        if needed != "inference":
            return self.service, self.uncapped
        return self.service.for_caller(caller, self.route.path, scope["headers"]), caps

    async def _respond(self, service: Service, request: Request) -> Response | EventStream:
        body = None
        if self.decoder is not None:
            raw = await read_body(request, service.settings.max_body_bytes)
            check_media_type(request)
            body = self.decoder.decode(raw)
            reply: Reply = await until_disconnect(request.receive, self.route.handler(service, request, body))
        else:
            reply = await self.route.handler(service, request, None)
        if isinstance(reply, Stream):
            return EventStream(reply, dialect_of(self.route.path), service.settings.sse_heartbeat_s)
        if isinstance(reply, Response):
            return reply
        return Response(msgspec.json.encode(reply), media_type="application/json")


class Routing:
    """The router, with its own errors (no such path, wrong method) in the one form.

    Starlette's application class would do the same behind two more layers that every streamed token has to cross.
    """

    def __init__(self, router: Router) -> None:
        self.router = router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self  # tells the router to raise instead of answering in plain text
        try:
            await self.router(scope, receive, send)
        except HTTPException as error:
            await error_reply(error).response(dialect_of(route_path(scope)))(scope, receive, send)


def build_app(
    frontend: Frontend, client: EngineClient, settings: ServerSettings, shared: Shared | None = None
) -> ASGIApp:
    """The ASGI application that serves ``frontend`` over HTTP.

    Every route wants a key where the settings have any, but for ``/health`` and ``/ping``. ``shared`` is what it has in
    common with other processes, where there are any.
    """
    shared = shared or Own(settings.response_limits)
    ring = KeyRing(settings.api_keys, settings.key_entries, settings.admin_api_key, shared.caps)
    metrics = shared.metrics
    if settings.enable_log_requests:
        metrics.observers.append(RequestLog(frontend.tokenizer, settings.max_log_len))
    if settings.otlp_traces_endpoint is not None:
        metrics.observers.append(
            trace_exporter(settings.otlp_traces_endpoint, settings.served_model_names[0])
        )
    if client.info.facts.can_generate:
        log.info("Tools are called in the format %s.", frontend.tool_syntax.name)  # found and proved now
    templates = GivenTemplates(frontend.template, trusted=settings.trust_request_chat_template)
    names = settings.served_model_names
    context = Context(frontend, client.info, names, metrics.start, __version__, templates)
    service = Service(context, client, settings, metrics, shared)
    routes = [*route_table()]
    made = msgspec.json.encode(
        document(routes, version=__version__, root_path=settings.root_path, secured=not ring.is_open)
    )

    async def openapi(_: Service, request: Request, body: None) -> Reply:
        return Response(made, media_type="application/json")

    routes.append(Route("GET", "/openapi.json", openapi, "This document.", scope=""))
    router = Router([StarletteRoute(r.path, Endpoint(service, r), methods=[r.method]) for r in routes])
    app: ASGIApp = Routing(router)
    app = BodyLimit(app, settings.max_body_bytes)
    app = BearerAuth(app, ring)
    if settings.allowed_hosts:
        app = HostCheck(app, settings.allowed_hosts)
    if settings.allowed_origins:
        # Outside the authentication: a browser's preflight request carries no key.
        app = CORSMiddleware(
            app, allow_origins=settings.allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
    return app
