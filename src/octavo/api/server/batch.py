"""OpenAI's batch files: a request a line in, an answer a line out, resumable after a kill.

    in    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    out   {"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200, "request_id": ..., "body": {...}},
           "error": null}

Every answer is appended with one write, in the order in which requests end. A run that begins with an output file skips the
ids that are in it and cuts off a line that was not written to its end.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from octavo.errors import UsageError

Call = Callable[[str, str, bytes], Awaitable[tuple[int, bytes]]]  # method, path, body -> status, body
MAX_LINE_BYTES = 64 << 20


class BatchRequest(msgspec.Struct, kw_only=True):
    """One line of the input."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    url: str
    body: msgspec.Raw
    method: str = "POST"


class BatchError(msgspec.Struct):
    """Why a line has no answer at all."""

    code: str
    message: str


class BatchReply(msgspec.Struct):
    """What a route answered, errors included."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class BatchLine(msgspec.Struct, kw_only=True):
    """One line of the output."""

    id: str
    custom_id: str | None
    response: BatchReply | None = None
    error: BatchError | None = None


class _Stream(msgspec.Struct):
    stream: Any = None


class _Done(msgspec.Struct):
    custom_id: str | None


@dataclass
class Progress:
    """How far a run is."""

    total: int = 0
    skipped: int = 0
    answered: int = 0
    failed: int = 0

    @property
    def done(self) -> int:
        """Lines that need no more work."""
        return self.skipped + self.answered + self.failed


def finished_ids(path: Path) -> set[str]:
    """The ids that an output file already holds; a last line that is not whole is cut off."""
    if not path.exists():
        return set()
    found: set[str] = set()
    decode = msgspec.json.Decoder(_Done).decode
    whole = 0
    with path.open("r+b") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                done = decode(line)
            except msgspec.DecodeError:
                raise UsageError(
                    f"{path}, line {number}: this is no line of a batch output.",
                    "Choose another --output-file.",
                ) from None
            whole += len(line)
            if done.custom_id is not None:
                found.add(done.custom_id)
        file.truncate(whole)
    return found


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line that is not empty."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UsageError(f"--input-file {path} cannot be read: {error.strerror}.") from None


class Batch:
    """One run from ``source`` to ``target``, at most ``concurrency`` requests at a time."""

    def __init__(self, source: Path, target: Path, concurrency: int) -> None:
        self.source = source
        self.target = target
        self.concurrency = concurrency
        self.progress = Progress(total=sum(1 for _ in lines_of(source)))
        self._finished = finished_ids(target)
        self._seen: set[str] = set()
        self._decode = msgspec.json.Decoder(BatchRequest).decode

    async def run(self, call: Call, tell: Callable[[Progress], None]) -> Progress:
        """Answer what is not answered yet. Cancelling it loses only what is under way."""
        running: set[asyncio.Task[None]] = set()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        file = os.open(self.target, flags, 0o644)
        try:
            for number, line in lines_of(self.source):
                request = self._read(number, line, file)
                if request is not None:
                    running.add(asyncio.create_task(self._answer(request, call, file)))
                tell(self.progress)
                while len(running) >= self.concurrency:
                    running = await self._some(running, tell)
            while running:
                running = await self._some(running, tell)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            os.close(file)
        return self.progress

    async def _some(
        self, running: set[asyncio.Task[None]], tell: Callable[[Progress], None]
    ) -> set[asyncio.Task[None]]:
        done, left = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        tell(self.progress)
        return left

    def _read(self, number: int, line: bytes, file: int) -> BatchRequest | None:
        """The request of a line; None where there is nothing to do, or nothing that could be done."""
        try:
            if len(line) > MAX_LINE_BYTES:
                raise msgspec.ValidationError(f"the line has {len(line)} bytes, at most {MAX_LINE_BYTES}")
            request = self._decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._write(file, BatchLine(id=_id(), custom_id=None, error=_wrong(number, str(error))))
            return None
        if request.custom_id in self._seen:
            message = f"custom_id {request.custom_id!r} is there twice"
            self._write(file, BatchLine(id=_id(), custom_id=None, error=_wrong(number, message)))
            return None
        self._seen.add(request.custom_id)
        if request.custom_id in self._finished:
            self.progress.skipped += 1
            return None
        problem = None
        if request.method != "POST":
            problem = f"the method must be POST, got {request.method!r}"
        elif _streams(request.body):
            problem = "stream: true has no meaning in a batch"
        if problem is not None:
            self._write(file, BatchLine(id=_id(), custom_id=request.custom_id, error=_wrong(number, problem)))
            return None
        return request

    async def _answer(self, request: BatchRequest, call: Call, file: int) -> None:
        status, body = await call(request.method, request.url, bytes(request.body))
        reply = BatchReply(status, uuid.uuid4().hex, msgspec.Raw(body or b"null"))
        self._write(file, BatchLine(id=_id(), custom_id=request.custom_id, response=reply))

    def _write(self, file: int, line: BatchLine) -> None:
        """Append a line with one write: a kill leaves it whole, absent, or cut at the very end of the file."""
        os.write(file, msgspec.json.encode(line) + b"\n")
        if line.response is not None and line.response.status_code < 400:
            self.progress.answered += 1
        else:
            self.progress.failed += 1


def _id() -> str:
    return f"batch_req_{uuid.uuid4().hex}"


def _wrong(number: int, message: str) -> BatchError:
    return BatchError("invalid_request", f"Line {number}: {message}.")


def _streams(body: msgspec.Raw) -> bool:
    try:
        return msgspec.json.decode(body, type=_Stream).stream is True
    except msgspec.DecodeError:
        return False  # the route says what is wrong with it
