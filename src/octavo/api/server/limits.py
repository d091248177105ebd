"""Limits before a request is understood: body size with an answer the client can read, and size of the head."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from octavo.api.server.auth import route_path
from octavo.api.server.body import too_large
from octavo.api.server.errors import dialect_of, error_reply

SWALLOW_SECONDS = 5.0
SWALLOW_FACTOR = 8  # times the limit


class BodyLimit:
    """Answers 413 as soon as a declared body is over ``limit`` bytes, before a byte of it is kept.

    A server that answers and closes while the client is still sending makes the client see a reset instead of the
    answer. So the answer goes out first, then what still arrives is read and dropped, within bounds of bytes and time.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._declared_too_large(scope):
            await self.app(scope, receive, send)
            return
        reply = error_reply(too_large(self.limit))
        body = reply.encode(dialect_of(route_path(scope)))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await self._swallow(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _declared_too_large(self, scope: Scope) -> bool:
        declared = [value for name, value in scope["headers"] if name == b"content-length"]
        return any(value.isdigit() and int(value[:20]) > self.limit for value in declared)

    async def _swallow(self, receive: Receive) -> None:
        left = self.limit * SWALLOW_FACTOR
        try:
            async with asyncio.timeout(SWALLOW_SECONDS):
                while left > 0:
                    message: Message = await receive()
                    left -= len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return
        except TimeoutError:
            return


def limited_protocol(max_header_bytes: int) -> type[HttpToolsProtocol]:
    """uvicorn's HTTP protocol class with a bound on the request head (431 beyond it).

    The parser gathers a header until it is complete and has no limit of its own: one endless header would fill the
    memory (CVE-2025-48956).
    """

    class LimitedProtocol(HttpToolsProtocol):
        in_head = True
        head_bytes = 0

        def on_message_begin(self) -> None:
            self.in_head, self.head_bytes = True, 0
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self.in_head = False
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if not self.in_head:
                return
            self.head_bytes += len(data)
            if self.head_bytes > max_header_bytes and not self.transport.is_closing():
                body = b'{"error":{"message":"The request head is larger than %d bytes.",' % max_header_bytes
                body += b'"type":"invalid_request_error","param":null,"code":"headers_too_large"}}'
                self.transport.write(
                    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
                    b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body
                )
                self.transport.close()

    return LimitedProtocol
