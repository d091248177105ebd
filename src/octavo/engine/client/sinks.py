"""Who waits for which request's deltas; the part every client shares. Used on the event loop's thread only."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from octavo.engine.client.base import Sink
from octavo.engine.validate import check_request
from octavo.errors import EngineDeadError, OctavoError, QueueFullError, RequestError
from octavo.protocol.control import EngineInfo
from octavo.protocol.generate import FinishReason, GenerateRequest, TokenDelta

log = logging.getLogger("octavo.engine")


def refusal(id: int, error: OctavoError) -> TokenDelta:
    """The only delta of a request that the engine does not take."""
    return TokenDelta(id, [], "rejected" if isinstance(error, QueueFullError) else "error", None, str(error))


class Throughput:
    """Requests a second, of those that ended last."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=256)

    def count(self) -> None:
        """A request has ended now."""
        self._ends.append(self._clock())

    def wait_s(self, num_requests: int) -> int:
        """Whole seconds until so many have ended, by what was measured: 1 to 300."""
        if len(self._ends) < 2:
            return 1
        per_request = (self._clock() - self._ends[0]) / len(self._ends)
        return max(1, min(300, round(per_request * num_requests)))


class Sinks:
    """Open requests by id."""

    def __init__(self, info: EngineInfo, clock: Callable[[], float] = time.monotonic) -> None:
        self.info = info
        self.throughput = Throughput(clock)
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
            # By then those in line now have begun, so that there is room to wait in again.
            raise QueueFullError(
                f"{len(self._open)} requests are running or waiting already.",
                self.throughput.wait_s(max(1, self.info.max_queue_len)),
            )
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
                self.throughput.count()
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
