"""An engine that can be started anew when it has died, behind one client that stays.

alive ──dies──> open requests have ended with "error"; new ones are refused (503) ──renew──> alive
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from octavo.engine.client.base import EngineClient, Sink
from octavo.errors import EngineDeadError
from octavo.protocol.control import Control, ControlReply, EngineInfo
from octavo.protocol.generate import GenerateRequest


class RenewedClient:
    """Implements ``EngineClient`` over the one that ``make`` returns, each time it is called.

    ``make`` blocks until the engine is ready and gives up with an error when the event it is given is set.
    """

    def __init__(
        self, make: Callable[[threading.Event], EngineClient], cancel: threading.Event | None = None
    ) -> None:
        self._make = make
        self._cancel = cancel or threading.Event()
        self._starting: asyncio.Future[EngineClient] | None = None
        self.current = make(self._cancel)
        self.info: EngineInfo = self.current.info

    @property
    def alive(self) -> bool:
        """See ``EngineClient.alive``."""
        return self.current.alive

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        """See ``EngineClient.submit``."""
        if self._starting is not None:
            raise EngineDeadError("The engine has died and is being started anew.", "Try again in a while.")
        self.current.submit(request, sink)

    def abort(self, ids: list[int]) -> None:
        """See ``EngineClient.abort``."""
        self.current.abort(ids)

    async def control(self, command: Control) -> ControlReply:
        """See ``EngineClient.control``."""
        return await self.current.control(command)

    async def renew(self) -> None:
        """Start an engine in place of the one that has died; raises what its start raises."""
        await self.current.close()
        loop = asyncio.get_running_loop()
        self._starting = loop.run_in_executor(None, self._make, self._cancel)
        try:
            self.current = await asyncio.shield(self._starting)
            self.info = self.current.info
        finally:
            if self._starting.done():
                self._starting = None

    async def close(self) -> None:
        """See ``EngineClient.close``; a start that goes on is given up."""
        self._cancel.set()
        if self._starting is not None:
            (started,) = await asyncio.gather(self._starting, return_exceptions=True)
            if not isinstance(started, BaseException):
                self.current = started
        await self.current.close()
