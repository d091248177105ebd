"""Questions and answers, both ways over one stream between two processes of the same user.

frame = length (4 bytes) | kind (1 byte: question, note, answer, failure) | number (8 bytes) | MessagePack
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from octavo.api.server.fronts.messages import Message
from octavo.errors import EngineDeadError, OctavoError

log = logging.getLogger("octavo.server")

QUESTION, NOTE, ANSWER, FAILURE = range(4)
HEAD = struct.Struct("<IBQ")
MAX_FRAME_BYTES = 1 << 30

Handler = Callable[[Message], Awaitable[Any]]  # what it returns is the answer; None for notes


class Wire:
    """One end of the stream. ``run`` reads until the other end is gone; both ends may ask at any time."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handler: Handler | None = None
    ) -> None:
        self.handler = handler
        self._reader, self._writer = reader, writer
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Message).decode
        self._asked: dict[int, asyncio.Future[bytes]] = {}
        self._next = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.gone = False

    async def ask(self, message: Message) -> bytes:
        """The encoded answer; ``OctavoError`` with the other side's words where it failed there."""
        if self.gone:
            raise EngineDeadError("The server's first process has ended.")
        self._next += 1
        number = self._next
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        try:
            self._send(QUESTION, number, self._encode(message))
            return await answer
        finally:
            self._asked.pop(number, None)

    def tell(self, message: Message) -> None:
        """A note: nothing comes back."""
        if not self.gone:
            self._send(NOTE, 0, self._encode(message))

    async def run(self) -> None:
        """Read until the stream ends; questions are answered beside each other, notes in order."""
        try:
            while True:
                length, kind, number = HEAD.unpack(await self._reader.readexactly(HEAD.size))
                if length > MAX_FRAME_BYTES:
                    raise OctavoError(f"A frame of {length} bytes came from another front process.")
                body = await self._reader.readexactly(length)
                if kind in (ANSWER, FAILURE):
                    self._settle(kind, number, body)
                else:
                    task = asyncio.create_task(self._serve(kind, number, self._decode(body)))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
        except (asyncio.IncompleteReadError, ConnectionError):
            log.debug("A front process has closed its wire.")
        finally:
            self.close()

    def close(self) -> None:
        """Close this end; whoever waits for an answer gets an error."""
        self.gone = True
        self._writer.close()
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(EngineDeadError("The other front process has ended."))

    def _send(self, kind: int, number: int, body: bytes) -> None:
        self._writer.write(HEAD.pack(len(body), kind, number) + body)

    def _settle(self, kind: int, number: int, body: bytes) -> None:
        answer = self._asked.get(number)
        if answer is None or answer.done():
            return
        if kind == FAILURE:
            answer.set_exception(OctavoError(body.decode()))
        else:
            answer.set_result(body)

    async def _serve(self, kind: int, number: int, message: Message) -> None:
        try:
            reply = None if self.handler is None else await self.handler(message)
            answer = ANSWER, self._encode(reply)
        except Exception as error:
            if not isinstance(error, OctavoError):
                log.exception("A question of another front process failed.")
            answer = FAILURE, str(error).encode()
        if kind == QUESTION and not self.gone:
            self._send(answer[0], number, answer[1])
