"""The one route table: the router, the authentication test and ``/openapi.json`` all read it."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from octavo.api.openai import schema
from octavo.api.openai.chat import chat_completions
from octavo.api.openai.completions import completions
from octavo.api.openai.models import list_models, retrieve_model
from octavo.api.openai.tokenize import detokenize, tokenize
from octavo.api.server.dialect_routes import dialect_routes
from octavo.api.server.metrics import CONTENT_TYPE, render
from octavo.api.server.route import Reply, Route, Service
from octavo.errors import EngineDeadError
from octavo.protocol.control import EngineStats, GetStats, ResetPrefixCache

STATS_TIMEOUT_S = 5.0
TOLD_HEADERS = (b"traceparent", b"tracestate", b"x-request-id")


class Version(msgspec.Struct):
    """Reply of ``GET /version``."""

    version: str


class Load(msgspec.Struct):
    """Reply of ``GET /load``: generation requests under way."""

    server_load: int


async def _chat(service: Service, _: Request, body: schema.ChatCompletionRequest) -> Reply:
    return await chat_completions(service.context, body)


async def _completions(service: Service, _: Request, body: schema.CompletionRequest) -> Reply:
    return await completions(service.context, body)


async def _models(service: Service, _: Request, body: None) -> Reply:
    return list_models(service.context)


async def _model(service: Service, request: Request, body: None) -> Reply:
    return retrieve_model(service.context, request.path_params["model"])


async def _tokenize(service: Service, _: Request, body: schema.TokenizeRequest) -> Reply:
    return await tokenize(service.context, body)


async def _detokenize(service: Service, _: Request, body: schema.DetokenizeRequest) -> Reply:
    return await detokenize(service.context, body)


async def _health(service: Service, _: Request, body: None) -> Reply:
    if not service.client.alive:
        raise EngineDeadError("The engine has stopped.", "Restart the server; its log names the cause.")
    return Response(status_code=200)


async def _version(service: Service, _: Request, body: None) -> Reply:
    return Version(service.context.version)


async def _load(service: Service, _: Request, body: None) -> Reply:
    return Load((await service.shared.totals()).in_flight)


async def _metrics(service: Service, _: Request, body: None) -> Reply:
    stats = None
    if service.client.alive:
        try:
            async with asyncio.timeout(STATS_TIMEOUT_S):
                reply = await service.client.control(GetStats())
            stats = reply if isinstance(reply, EngineStats) else None
        except (TimeoutError, EngineDeadError):
            stats = None  # a busy or dying engine must not take the front half's own numbers away
    page = render(
        await service.shared.totals(),
        service.context.info,
        stats,
        prefix=service.settings.metrics_prefix,
        model=service.context.served_model_names[0],
    )
    return Response(page, media_type=CONTENT_TYPE)


async def _reset_prefix_cache(service: Service, _: Request, body: None) -> Reply:
    await service.client.control(ResetPrefixCache())
    return Response(status_code=200)


def route_table() -> tuple[Route, ...]:
    """All routes but ``/openapi.json``, which is made from them."""
    return (
        Route(
            "POST",
            "/v1/chat/completions",
            _chat,
            "Answer a conversation.",
            schema.ChatCompletionRequest,
            schema.ChatCompletion,
            schema.ChatCompletionChunk,
        ),
        Route(
            "POST",
            "/v1/completions",
            _completions,
            "Continue one or more prompts.",
            schema.CompletionRequest,
            schema.Completion,
            schema.Completion,
        ),
        *dialect_routes(),
        Route("GET", "/v1/models", _models, "List the served names.", reply=schema.ModelList),
        Route("GET", "/v1/models/{model:path}", _model, "Describe one served name.", reply=schema.ModelCard),
        Route(
            "POST",
            "/tokenize",
            _tokenize,
            "Token ids of a text or a conversation.",
            schema.TokenizeRequest,
            schema.TokenizeResponse,
        ),
        Route(
            "POST",
            "/detokenize",
            _detokenize,
            "Text of token ids.",
            schema.DetokenizeRequest,
            schema.DetokenizeResponse,
        ),
        Route("GET", "/health", _health, "200 while the engine runs, 503 after.", scope=""),
        Route("GET", "/ping", _health, "The same as /health.", scope=""),
        Route("POST", "/ping", _health, "The same as /health.", scope=""),
        Route("GET", "/version", _version, "The version of the server.", reply=Version, scope=""),
        Route("GET", "/load", _load, "Generation requests under way.", reply=Load, scope="metrics"),
        Route(
            "GET", "/metrics", _metrics, "Prometheus metrics.", reply_media_type="text/plain", scope="metrics"
        ),
        Route(
            "POST", "/reset_prefix_cache", _reset_prefix_cache, "Forget every cached prefix.", scope="admin"
        ),
    )
