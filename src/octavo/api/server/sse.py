"""Server-sent events straight on ASGI, and the watch for clients that hang up."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from octavo.api.openai.context import Stream
from octavo.api.server.errors import ClientGoneError, ShuttingDownError, error_reply

T = TypeVar("T")

HEADERS = [
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold tokens back otherwise
]


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled (``ClientGoneError``) when the client hangs up first.

    The request body must have been read: any further message is the end of the connection.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientGoneError
    finally:
        # Also on our own cancellation (shutdown): the generator below must run its clean-up now, not when collected.
        for task in (worker, watcher):
            task.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """An ASGI response that sends what a stream's events yield (whole events as bytes), then its form's end.

    Nothing is sent before the first event or heartbeat: an error until then is raised to the caller, who can still
    answer with a status. A later one becomes an error event. However it ends ``close`` is called, which aborts what
    still runs in the engine (closing ``events`` alone would do nothing if it was never started).
    """

    status_code = 200

    def __init__(self, stream: Stream, dialect: str, heartbeat_s: float) -> None:
        self.events = stream.events
        self.close = stream.close
        self.form = stream.form
        self.dialect = dialect
        self.heartbeat_s = heartbeat_s if stream.form.heartbeat else 0.0
        self.started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._stream(send))
        except ClientGoneError:
            return
        except (Exception, asyncio.CancelledError) as error:
            if not self.started:
                raise
            if isinstance(error, asyncio.CancelledError):  # only a shutdown cancels a connection
                error = ShuttingDownError("The server is shutting down; the answer is not complete.")
            form = self.form
            message = form.error_head + error_reply(error).encode(self.dialect) + form.error_tail + form.done
            await send({"type": "http.response.body", "body": message, "more_body": False})
        finally:
            self.close()

    async def _stream(self, send: Send) -> None:
        try:
            first = await self._first(send)
            await self._start(send)
            if first is not None:
                await send({"type": "http.response.body", "body": first, "more_body": True})
            async for event in self.events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": self.form.done, "more_body": False})
        finally:
            await self.events.aclose()

    async def _first(self, send: Send) -> bytes | None:
        """The first event, with heartbeats while it does not come; None from an empty stream."""
        pending = asyncio.ensure_future(anext(self.events, None))
        try:
            while not pending.done():
                await asyncio.wait((pending,), timeout=self.heartbeat_s or None)
                if not pending.done():
                    await self._start(send)
                    await send({"type": "http.response.body", "body": self.form.heartbeat, "more_body": True})
            return pending.result()
        finally:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)

    async def _start(self, send: Send) -> None:
        if not self.started:
            self.started = True
            headers = [(b"content-type", self.form.media_type.encode()), *HEADERS]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
