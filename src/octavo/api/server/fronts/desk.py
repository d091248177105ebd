"""The first front process answers the others: it keeps what all share and adds up what all count.

another front                     the first one
borrowed.Borrowed  ──wire──>  Desk ── responses, caps of keys, engines' folders
                   <──wire──  how much have you counted? end this response; the engine is lost
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from octavo.api.openai.responses import keeper
from octavo.api.openai.responses.schema import Failure, Response
from octavo.api.openai.responses.store import Kept, ResponseNotFoundError, StoreLimits
from octavo.api.server.fronts import messages
from octavo.api.server.fronts.messages import Counts, Message
from octavo.api.server.fronts.wire import Wire
from octavo.api.server.metrics import RequestMetrics
from octavo.api.server.shared import Own
from octavo.errors import OctavoError, QueueFullError

log = logging.getLogger("octavo.server")

COUNT_SECONDS = 2.0  # for a process to say what it has counted; then what it said last is taken
GONE = Failure("server_error", "The process that made this response has ended.")


class Guest:
    """Another front process, as the desk knows it. ``counts`` are the last that it told."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.front = 0
        self.counts = Counts()
        self.taken: Counter[str] = Counter()  # requests under way, by key


class Desk(Own):
    """Implements ``Shared`` for the first process, and serves the others at a unix socket."""

    def __init__(self, limits: StoreLimits, begin: messages.Begin) -> None:
        super().__init__(limits)
        self.guests: list[Guest] = []
        self.on_serving: Callable[[int], None] = lambda front: None
        self._begin = begin
        self._engines: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        self._past = RequestMetrics()  # of processes that have ended
        self._server: asyncio.Server | None = None

    async def open(self, path: str) -> None:
        """Listen."""
        self._server = await asyncio.start_unix_server(self._welcome, path)

    def engines_ready(self, folders: list[str]) -> None:
        """From now on other processes can join the engines."""
        self._engines.set_result(folders)

    def engine_lost(self, reason: str) -> None:
        """Tell everybody; who asks from now on waits for the next one."""
        if self._engines.done():
            self._engines = asyncio.get_running_loop().create_future()
        for guest in self.guests:
            guest.wire.tell(messages.EngineLost(reason))

    async def close(self) -> None:
        """Stop listening and close every wire."""
        if self._server is not None:
            self._server.close()
        for guest in list(self.guests):
            guest.wire.close()
        self._engines.cancel()

    async def totals(self) -> RequestMetrics:
        """See ``Shared``."""
        return await self._totals(None)

    async def _totals(self, asker: Guest | None) -> RequestMetrics:
        others = [guest for guest in self.guests if guest is not asker]
        await asyncio.gather(*map(self._count, others))
        total = RequestMetrics()
        for counts in (self.metrics.counts(), self._past.counts(), *(guest.counts for guest in self.guests)):
            total.add(counts)
        return total

    async def _count(self, guest: Guest) -> None:
        try:
            async with asyncio.timeout(COUNT_SECONDS):
                raw = await guest.wire.ask(messages.Count())
            guest.counts = msgspec.msgpack.decode(raw, type=Counts)
        except (TimeoutError, OctavoError):
            log.debug("Front process %d did not say what it has counted.", guest.front)

    # -- guests -------------------------------------------------------------------------------------------------

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        guest = Guest(Wire(reader, writer))
        guest.wire.handler = partial(self._answer, guest)
        self.guests.append(guest)
        try:
            await guest.wire.run()
        finally:
            self._part(guest)

    def _part(self, guest: Guest) -> None:
        """A process has ended: keep what it counted, give back what it held."""
        self.guests.remove(guest)
        guest.counts.in_flight = 0
        self._past.add(guest.counts)
        for key, count in guest.taken.items():
            for _ in range(count):
                self.caps_of_key(key).give()
        self.store.fail_at(guest, GONE)

    async def _answer(self, guest: Guest, message: Message) -> Any:
        match message:
            case messages.Hello(front):
                guest.front = front
                return self._begin
            case messages.WhereEngines():
                return await asyncio.shield(self._engines)
            case messages.Serving():
                self.on_serving(guest.front)
            case messages.Total(mine):
                guest.counts = mine
                return (await self._totals(guest)).counts()
            case messages.Take() | messages.Give():
                return self._cap(guest, message)
            case _:
                return await self._response(guest, message)
        return None

    def _cap(self, guest: Guest, message: messages.Take | messages.Give) -> tuple[str, int] | None:
        caps = self.caps_of_key(message.key)
        if isinstance(message, messages.Give):
            caps.give()
            guest.taken[message.key] -= 1
            return None
        try:
            caps.take()
        except QueueFullError as error:
            return error.cause, error.retry_after_s
        guest.taken[message.key] += 1
        return None

    async def _response(self, guest: Guest, message: Message) -> Any:
        """Questions about kept responses."""
        match message:
            case messages.Keep(owner, raw, running):
                self._keep(guest, owner, keeper.unpack(raw), running)
            case messages.Fetch(owner, response_id):
                try:
                    return keeper.pack(self.store.get(owner, response_id))
                except ResponseNotFoundError:
                    return None
            case messages.Forget(owner, response_id):
                self.store.remove(owner, response_id)
            case messages.Running(owner):
                try:
                    self.store.check_running(owner)
                except QueueFullError as error:
                    return error.cause
            case messages.Cancel(owner, response_id):
                return msgspec.json.encode(await self.keeper.cancel(owner, response_id))
        return None

    def _keep(self, guest: Guest, owner: str, kept: Kept, running: bool) -> None:
        response_id = kept.response.id
        if running:
            cancel = messages.Cancel(owner, response_id)

            async def cancel_away() -> Response:
                raw = msgspec.msgpack.decode(await guest.wire.ask(cancel), type=bytes | None)
                return kept.response if raw is None else msgspec.json.decode(raw, type=Response)

            kept.stop, kept.cancel_away = partial(guest.wire.tell, cancel), cancel_away
        kept.place = guest
        before = self.store.peek(owner, response_id)
        if before is not None and before.place is guest:
            before.stop = None  # the same response, further on
        self.store.put(owner, kept)
