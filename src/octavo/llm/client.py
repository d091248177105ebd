"""The engine in the caller's own thread, as an ``EngineClient``."""

from __future__ import annotations

from typing import Protocol

from octavo.engine.client.base import Sink
from octavo.errors import EngineDeadError
from octavo.protocol.control import Control, ControlReply, EngineInfo
from octavo.protocol.generate import GenerateRequest, TokenDelta


class Core(Protocol):
    """What ``LLM`` needs of ``engine.core.EngineCore``."""

    info: EngineInfo

    def submit(self, request: GenerateRequest) -> None:
        """Queue a request."""

    def abort(self, ids: list[int]) -> None:
        """Stop requests."""

    def step(self) -> list[TokenDelta]:
        """Run one step."""

    def control(self, command: Control) -> ControlReply:
        """Ask or order something."""

    def close(self) -> None:
        """Free the device."""


class DirectClient:
    """An ``EngineClient`` without thread or process: whoever holds it calls ``pump`` to make the engine go on."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.info = core.info
        self.alive = True
        self._sinks: dict[int, Sink] = {}

    @property
    def busy(self) -> bool:
        """True while a request is open."""
        return bool(self._sinks)

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        """Queue a request; ``pump`` feeds its sink."""
        self.core.submit(request)
        self._sinks[request.id] = sink

    def abort(self, ids: list[int]) -> None:
        """Stop requests; they get no further delta."""
        known = [i for i in ids if self._sinks.pop(i, None) is not None]
        if known:
            self.core.abort(known)

    def pump(self) -> None:
        """Run one step and deliver what it brought; an engine that fails ends everything open."""
        try:
            deltas = self.core.step()
        except EngineDeadError:
            self.alive = False
            self._sinks.clear()
            raise
        for delta in deltas:
            sink = self._sinks.get(delta.id)
            if sink is None:
                continue
            if delta.finish_reason is not None:
                del self._sinks[delta.id]
            sink(delta)

    async def control(self, command: Control) -> ControlReply:
        """Ask or order something that is not a request."""
        return self.core.control(command)

    async def close(self) -> None:
        """Free the device."""
        self.shutdown()

    def shutdown(self) -> None:
        """``close`` for callers without an event loop; a second call does nothing."""
        if self.alive:
            self.alive = False
            self._sinks.clear()
            self.core.close()
