"""Routes of the dialects beside OpenAI's first two: each maps fields over the same conversations."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from starlette.requests import Request

from octavo.api.anthropic import schema as anthropic
from octavo.api.anthropic.messages import count_tokens, messages
from octavo.api.openai.context import Context
from octavo.api.server.route import Reply, Route, Service

Answer = Callable[[Context, Any], Coroutine[Any, Any, Reply]]


def dialect_routes() -> tuple[Route, ...]:
    """All of them."""
    return _anthropic()


def _anthropic() -> tuple[Route, ...]:
    return (
        Route(
            "POST",
            "/v1/messages",
            handler(messages),
            "Answer a conversation (Anthropic).",
            anthropic.MessagesRequest,
            anthropic.MessageReply,
            anthropic.MessageStart,
        ),
        Route(
            "POST",
            "/v1/messages/count_tokens",
            handler(count_tokens),
            "Tokens of a conversation (Anthropic).",
            anthropic.CountTokensRequest,
            anthropic.TokenCount,
        ),
    )


def handler(answer: Answer) -> Callable[[Service, Request, Any], Coroutine[Any, Any, Reply]]:
    """A route's handler around a function of a dialect."""

    async def handle(service: Service, _: Request, body: Any) -> Reply:
        return await answer(service.context, body)

    return handle
