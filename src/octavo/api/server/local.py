"""Requests to the application from this very process: no socket, the same routes, limits and errors."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message


async def call(app: ASGIApp, method: str, path: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of the reply. Cancelling it is what a client that hangs up is."""
    status = 0
    parts: list[bytes] = []
    unread = True

    async def receive() -> Message:
        nonlocal unread
        if unread:
            unread = False
            return {"type": "http.request", "body": body, "more_body": False}
        await asyncio.Event().wait()  # the client stays until it is cancelled
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": ("local", 0),
        "server": ("local", 0),
    }
    await app(scope, receive, send)
    return status, b"".join(parts)
