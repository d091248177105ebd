"""Who waits for which request's deltas; the part every client shares. Used on the event loop's thread only."""

from __future__ import annotations

import logging

from octavo.engine.client.base import Sink
from octavo.engine.validate import check_request
from octavo.errors import EngineDeadError, QueueFullError, RequestError
from octavo.protocol.control import EngineInfo
from octavo.protocol.generate import FinishReason, GenerateRequest, TokenDelta

log = logging.getLogger("octavo.engine")


class Sinks:
    """Open requests by id."""

    def __init__(self, info: EngineInfo) -> None:
        self.info = info
        self.reason_dead: str | None = None
        self._open: dict[int, Sink] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, request: GenerateRequest, sink: Sink) -> None:
        """Register a request, or raise what makes it impossible (see ``EngineClient.submit``)."""
        if self.reason_dead is not None:
            raise EngineDeadError(self.reason_dead, "Restart the server.")
        check_request(request, self.info)
        if len(self._open) >= self.info.max_num_seqs + self.info.max_queue_len:
            raise QueueFullError(f"{len(self._open)} requests are running or waiting already.")
        if request.id in self._open:
            raise RequestError(f"Request id {request.id} is already running.", "id")
        self._open[request.id] = sink

    def remove(self, ids: list[int]) -> list[int]:
        """Forget requests; returns those that were open."""
        return [id for id in ids if self._open.pop(id, None) is not None]

    def deliver(self, deltas: list[TokenDelta]) -> None:
        """Hand out one step's deltas; a sink that raises hurts only its own request."""
        for delta in deltas:
            if delta.finish_reason is None:
                sink = self._open.get(delta.id)
            else:
                sink = self._open.pop(delta.id, None)
            if sink is not None:
                try:
                    sink(delta)
                except Exception:
                    log.exception("The receiver of request %d failed.", delta.id)

    def end_all(self, reason: FinishReason, message: str) -> None:
        """The engine is gone: give every open request its last delta, refuse new ones."""
        if self.reason_dead is None:
            self.reason_dead = message
        self.deliver([TokenDelta(id, [], reason, None, message) for id in list(self._open)])
