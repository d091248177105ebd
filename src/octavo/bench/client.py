"""A streaming HTTP/1.1 client that costs microseconds a chunk, so that a load test measures the server.

One ``Connection`` carries one answer at a time and is kept alive; the body is decoded (chunked framing, server-sent
events, JSON) inside ``data_received`` with no task switch a chunk. RFC 9112 (framing), WHATWG HTML (events).
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec

from octavo.errors import UsageError

MAX_HEADER_BYTES = 1 << 16
MAX_ERROR_BYTES = 1 << 14


class Delta(msgspec.Struct):
    """The part of a chat chunk that holds text."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Choice(msgspec.Struct):
    """One choice of a chunk; ``text`` for completions, ``delta`` for chat."""

    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None


class Usage(msgspec.Struct):
    """Token counts as the server reports them."""

    prompt_tokens: int = 0
    completion_tokens: int | None = 0


class Chunk(msgspec.Struct):
    """The fields of a stream chunk that a load test reads; the rest is skipped undecoded."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


@dataclass(slots=True)
class Answer:
    """What one request brought; times in seconds, ``start`` on ``time.perf_counter``'s clock.

    ``output_tokens`` is the server's count (``usage``) where it reports one, else the number of chunks.
    """

    start: float = 0.0
    success: bool = False
    error: str = ""
    ttft: float = 0.0
    latency: float = 0.0
    itl: list[float] = field(default_factory=list)
    output_tokens: int = 0
    prompt_tokens: int = 0
    text: str = ""


class EventReader:
    """Folds the bytes of one event stream into an ``Answer``."""

    __slots__ = ("answer", "decode", "done", "finished", "last", "num_chunks", "parts", "tail", "usage")

    def __init__(self, answer: Answer, decode: Callable[[bytes], Chunk]) -> None:
        self.answer = answer
        self.decode = decode
        self.tail = b""
        self.parts: list[str] = []
        self.last = 0.0
        self.num_chunks = 0
        self.usage: Usage | None = None
        self.done = False
        self.finished = False

    def feed(self, data: bytes, now: float) -> None:
        """Take body bytes that arrived at ``now``; events may be cut anywhere."""
        lines = (self.tail + data).split(b"\n")
        self.tail = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def _event(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            self.done = True
            return
        chunk = self.decode(payload)
        if chunk.error is not None:
            self.answer.error = str(chunk.error)
        if chunk.usage is not None:
            self.usage = chunk.usage
        if chunk.choices:
            self._choice(chunk.choices[0], now)

    def _choice(self, choice: Choice, now: float) -> None:
        delta = choice.delta
        if delta is None:
            text = choice.text or ""
            counts = True  # a token may have no text of its own
        else:
            text = (delta.content or "") + (delta.reasoning_content or delta.reasoning or "")
            counts = delta.role is None
        if choice.finish_reason is not None:
            self.finished = True
            counts = False  # the closing chunk is a token only if it brings text
        if not (counts or text):
            return
        self.num_chunks += 1
        if self.num_chunks == 1:
            self.answer.ttft = now - self.answer.start
        else:
            self.answer.itl.append(now - self.last)
        self.last = now
        self.parts.append(text)

    def close(self) -> None:
        """The body has ended: fill in counts, latency and success."""
        answer = self.answer
        answer.text = "".join(self.parts)
        if self.usage is not None:
            answer.prompt_tokens = self.usage.prompt_tokens or answer.prompt_tokens
            answer.output_tokens = self.usage.completion_tokens or 0
        else:
            answer.output_tokens = self.num_chunks
        answer.latency = self.last - answer.start if self.num_chunks else 0.0
        if answer.error:
            return
        if not (self.done or self.finished):
            answer.error = "the stream ended before its finish_reason"
        elif not self.num_chunks:
            answer.error = "the stream held no token"
        else:
            answer.success = True


class Connection(asyncio.Protocol):
    """One keep-alive connection; ``send`` starts a request and returns the future that its answer completes."""

    def __init__(
        self, decode: Callable[[bytes], Chunk], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.decode = decode
        self.clock = clock
        self.transport: asyncio.Transport | None = None
        self.buffer = b""
        self.waiter: asyncio.Future[None] | None = None
        self.reader: EventReader | None = None
        self.answer = Answer()
        self.status = 0
        self.chunked = False
        self.remaining = -1  # body bytes left of this chunk or of the whole body; -1: until the end
        self.in_body = False
        self.error_body = b""
        self.reusable = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport (asyncio)."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's own class is not a subclass of it

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer hung up (asyncio); an answer without length ends here, any other is cut off."""
        self.reusable = False
        self.transport = None
        if self.waiter is None:
            return
        if self.in_body and not self.chunked and self.remaining < 0:
            self._complete()
        else:
            self._fail(f"connection closed by the server{f': {exc}' if exc else ''}")

    def send(self, request: bytes, answer: Answer) -> asyncio.Future[None]:
        """Write one request; the future completes when the answer has ended, well or not."""
        self.waiter = asyncio.get_running_loop().create_future()
        waiter = self.waiter
        self.answer = answer
        self.reader = EventReader(answer, self.decode)
        self.status, self.chunked, self.remaining, self.in_body = 0, False, -1, False
        self.error_body = b""
        answer.start = self.clock()
        if self.transport is None or self.transport.is_closing():
            self._fail("connection closed by the server")
        else:
            self.transport.write(request)
        return waiter

    def data_received(self, data: bytes) -> None:
        """Bytes of the answer (asyncio)."""
        if self.waiter is None:
            return
        now = self.clock()
        self.buffer = self.buffer + data if self.buffer else data
        try:
            if self.in_body or self._head():
                self._body(now)
        except (ValueError, msgspec.MsgspecError) as error:
            self.reusable = False
            self._fail(f"unreadable answer: {error}")

    def _head(self) -> bool:
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self.buffer) > MAX_HEADER_BYTES:
                raise ValueError("response headers are too large")
            return False
        lines = self.buffer[:end].split(b"\r\n")
        self.buffer = self.buffer[end + 4 :]
        self.status = int(lines[0].split(b" ", 2)[1])
        if 100 <= self.status < 200:
            return self._head()
        for line in lines[1:]:
            name, _, value = line.partition(b":")
            name, value = name.strip().lower(), value.strip().lower()
            if name == b"transfer-encoding":
                self.chunked = b"chunked" in value
            elif name == b"content-length":
                self.remaining = int(value)
            elif name == b"connection" and b"close" in value:
                self.reusable = False
        if self.chunked:
            self.remaining = 0
        self.in_body = True
        return True

    def _body(self, now: float) -> None:
        while True:
            if self.chunked and self.remaining == 0:
                size, found, rest = self.buffer.partition(b"\r\n")
                if not found:
                    return
                if not size:  # the line end that closes the chunk before
                    self.buffer = rest
                    continue
                self.remaining = int(size.partition(b";")[0], 16)
                if self.remaining == 0:
                    self._trailer(rest)
                    return
                self.buffer = rest
            if self.remaining == 0:
                self._complete()
                return
            if not self.buffer:
                return
            part = self.buffer if self.remaining < 0 else self.buffer[: self.remaining]
            self.buffer = self.buffer[len(part) :]
            if self.remaining > 0:
                self.remaining -= len(part)
            self._take(part, now)

    def _trailer(self, rest: bytes) -> None:
        """After the last chunk: trailer lines and an empty line; they may come later, then try again."""
        if rest.startswith(b"\r\n"):
            self.buffer = rest[2:]
        elif b"\r\n\r\n" in rest:
            self.buffer = rest.partition(b"\r\n\r\n")[2]
        else:
            self.buffer = b"0\r\n" + rest
            return
        self._complete()

    def _take(self, part: bytes, now: float) -> None:
        if self.status != 200:
            if len(self.error_body) < MAX_ERROR_BYTES:
                self.error_body += part
        elif self.reader is not None:
            self.reader.feed(part, now)

    def _complete(self) -> None:
        if self.status != 200:
            self._fail(f"HTTP {self.status}: {self.error_body.decode('utf-8', 'replace')[:500]}")
            return
        if self.reader is not None:
            self.reader.close()
        self._done()

    def _fail(self, message: str) -> None:
        self.answer.error = self.answer.error or message
        self._done()

    def _done(self) -> None:
        waiter, self.waiter, self.reader, self.in_body = self.waiter, None, None, False
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class Client:
    """A pool of connections to one server.

    ``base_url`` is like ``http://127.0.0.1:8000``; a path in it goes before every endpoint. ``UsageError`` when it is
    not an http(s) address or nothing answers there.
    """

    def __init__(self, base_url: str, headers: dict[str, str] | None = None) -> None:
        parts = urlsplit(base_url if "//" in base_url else f"http://{base_url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{base_url!r} is not an http address.", "Write it like http://127.0.0.1:8000.")
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self.prefix = parts.path.rstrip("/")
        self.base_url = base_url
        self.headers = headers or {}
        self.decode = msgspec.json.Decoder(Chunk).decode
        self.idle: list[Connection] = []

    def encode(self, endpoint: str, body: bytes) -> bytes:
        """The request's bytes on the wire, ready before the clock starts."""
        lines = [
            f"POST {self.prefix}{endpoint} HTTP/1.1",
            f"Host: {self.host}:{self.port}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in self.headers.items()),
        ]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body

    async def stream(self, request: bytes, prompt_tokens: int = 0) -> Answer:
        """Send one encoded request and wait for the end of its answer; failures are in ``Answer.error``."""
        answer = Answer(prompt_tokens=prompt_tokens)
        reused = True
        while True:
            connection = self._idle()
            if connection is None:
                reused = False
                try:
                    connection = await self._connect()
                except OSError as error:
                    answer.start = time.perf_counter()
                    answer.error = f"cannot connect to {self.base_url}: {error}"
                    return answer
            try:
                await connection.send(request, answer)
            finally:  # cancelled in mid-answer: a half-read connection must not be used again
                if connection.waiter is not None and connection.transport is not None:
                    connection.transport.abort()
            if connection.reusable and connection.transport is not None:
                self.idle.append(connection)
            elif connection.transport is not None:
                connection.transport.close()
            # A kept connection that the server closed meanwhile answers nothing: once more on a fresh one.
            if reused and answer.error.startswith("connection closed") and not connection.status:
                answer.error, reused = "", False
                self.close()
                continue
            return answer

    def close(self) -> None:
        """Close every idle connection."""
        while self.idle:
            transport = self.idle.pop().transport
            if transport is not None:
                transport.close()

    def _idle(self) -> Connection | None:
        while self.idle:
            connection = self.idle.pop()
            if connection.transport is not None and not connection.transport.is_closing():
                return connection
        return None

    async def _connect(self) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(self.decode), self.host, self.port, ssl=self.ssl
        )
        return connection
