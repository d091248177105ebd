"""The seam between the front half and the engine: submit, abort, control, close."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from octavo.protocol.control import Control, ControlReply, EngineInfo
from octavo.protocol.generate import GenerateRequest, TokenDelta

Sink = Callable[[TokenDelta], None]


class EngineClient(Protocol):
    """Speaks to one engine. All methods are called on the event loop's thread, sinks are called there too.

    ``submit`` hands a request over; ``sink`` gets every delta, the last one with ``finish_reason``. When the engine
    dies every open sink gets a last delta with ``finish_reason="error"`` and ``alive`` turns False.
    ``submit`` raises ``QueueFullError`` or ``EngineDeadError``. ``abort`` of an unknown id does nothing; an aborted
    request gets no further delta.
    """

    info: EngineInfo

    @property
    def alive(self) -> bool:
        """Whether requests can still be served."""

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        """Queue a request."""

    def abort(self, ids: list[int]) -> None:
        """Stop requests and free what they hold."""

    async def control(self, command: Control) -> ControlReply:
        """Ask or order something that is not a request."""

    async def close(self) -> None:
        """Stop the engine (in-process) or the connection and the process behind it."""
