"""Every route of the application, also those that do not exist yet: what the walks of the security tests share."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from octavo.api.server.routes import route_table

VOCAB_SIZE = 300
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "Hi", "max_tokens": 4},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [72]},
}
GENERATES = ("/v1/chat/completions", "/v1/completions")
OPEN = {"/health", "/ping"}


def routes() -> list[tuple[str, str]]:
    """(method, path) of the whole table and of the document made from it; path parameters are filled in."""
    found = [(route.method, re.sub(r"\{[^}]*\}", "fake", route.path)) for route in route_table()]
    return [*found, ("GET", "/openapi.json")]


def posts() -> list[str]:
    """Paths of the routes that take a body."""
    return [re.sub(r"\{[^}]*\}", "fake", route.path) for route in route_table() if route.body is not None]


def ask(
    app: Any, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes = b"{}"
) -> tuple[int, bytes]:
    """Status and body of one bare ASGI request: no client library between us and the application."""
    status, parts, left = 0, [], [body]

    async def receive() -> dict[str, Any]:
        if not left:
            await asyncio.Event().wait()  # the client stays
        return {"type": "http.request", "body": left.pop(), "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode("latin-1", "replace"),
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "http_version": "1.1",
        "scheme": "http",
        "server": ("x", 1),
        "client": ("x", 1),
    }
    asyncio.run(app(scope, receive, send))
    return status, b"".join(parts)
