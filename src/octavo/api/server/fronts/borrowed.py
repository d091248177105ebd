"""A further front process: everything that the server's processes share is asked of the first one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from octavo.api.openai.responses import keeper
from octavo.api.openai.responses.keeper import ResponseKeeper
from octavo.api.openai.responses.schema import Response
from octavo.api.openai.responses.store import Kept, StoreLimits, not_kept
from octavo.api.server.fronts import messages
from octavo.api.server.fronts.messages import Counts, Message
from octavo.api.server.fronts.wire import Wire
from octavo.api.server.keys import Caps, KeyEntry
from octavo.api.server.metrics import RequestMetrics
from octavo.errors import QueueFullError


class Borrowed:
    """Implements ``Shared`` over a wire to the first process."""

    def __init__(self, wire: Wire, limits: StoreLimits) -> None:
        self.metrics = RequestMetrics()
        self._keeper = BorrowedKeeper(wire, limits)
        self.keeper: ResponseKeeper = self._keeper
        self._wire = wire

    def caps(self, entry: KeyEntry) -> Caps:
        """See ``Shared``; a key without limits is not asked for."""
        limited = entry.max_concurrent is not None or entry.requests_per_minute is not None
        return BorrowedCaps(self._wire, entry.name) if limited else Caps()

    async def totals(self) -> RequestMetrics:
        """See ``Shared``."""
        raw = await self._wire.ask(messages.Total(self.metrics.counts()))
        total = RequestMetrics()
        total.add(msgspec.msgpack.decode(raw, type=Counts))
        return total

    async def answer(self, message: Message) -> Any:
        """Answer what the first process asks."""
        if isinstance(message, messages.Count):
            return self.metrics.counts()
        if isinstance(message, messages.Cancel):
            return self._keeper.end(message.owner, message.response_id)
        return None


class BorrowedCaps(Caps):
    """Caps that the first process counts."""

    def __init__(self, wire: Wire, name: str) -> None:
        super().__init__()
        self._wire = wire
        self._name = name

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """See ``Caps``."""
        refusal = msgspec.msgpack.decode(
            await self._wire.ask(messages.Take(self._name)), type=tuple[str, int] | None
        )
        if refusal is not None:
            raise QueueFullError(*refusal)
        try:
            yield
        finally:
            self._wire.tell(messages.Give(self._name))


class BorrowedKeeper:
    """Implements ``ResponseKeeper``; knows itself only what runs in the background here."""

    def __init__(self, wire: Wire, limits: StoreLimits) -> None:
        self._wire = wire
        self._limits = limits
        self._running: dict[tuple[str, str], Kept] = {}

    async def keep(self, owner: str, kept: Kept) -> None:
        """See ``ResponseKeeper``."""
        key, running = (owner, kept.response.id), kept.stop is not None
        before = self._running.get(key)
        if before is not None and before is not kept and before.stop is not None:
            before.stop()  # the client gave its id to another
        if running:
            self._running[key] = kept
        else:
            self._running.pop(key, None)
        await self._wire.ask(messages.Keep(owner, keeper.pack(kept), running))

    async def fetch(self, owner: str, response_id: str) -> Kept:
        """See ``ResponseKeeper``."""
        answer = await self._wire.ask(messages.Fetch(owner, response_id))
        raw = msgspec.msgpack.decode(answer, type=bytes | None)
        if raw is None:
            raise not_kept(response_id, self._limits)
        return keeper.unpack(raw)

    async def forget(self, owner: str, response_id: str) -> None:
        """See ``ResponseKeeper``."""
        await self.fetch(owner, response_id)
        await self._wire.ask(messages.Forget(owner, response_id))

    async def check_running(self, owner: str) -> None:
        """See ``ResponseKeeper``."""
        cause = msgspec.msgpack.decode(await self._wire.ask(messages.Running(owner)), type=str | None)
        if cause is not None:
            raise QueueFullError(cause)

    async def cancel(self, owner: str, response_id: str) -> Response:
        """See ``ResponseKeeper``."""
        keeper.check_background(await self.fetch(owner, response_id))
        raw = await self._wire.ask(messages.Cancel(owner, response_id))
        return msgspec.json.decode(msgspec.msgpack.decode(raw, type=bytes), type=Response)

    def end(self, owner: str, response_id: str) -> bytes | None:
        """End what runs here, at the first process's word; the response as it is then, None where nothing runs."""
        kept = self._running.pop((owner, response_id), None)
        if kept is None:
            return None
        if kept.stop is not None:
            kept.stop()
        return msgspec.json.encode(kept.response)
