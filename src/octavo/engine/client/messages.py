"""What travels between a client and an engine in its own process: msgspec types, encoded as MessagePack."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from octavo.engine.process import Failed
from octavo.protocol.control import Control, ControlReply, EngineInfo, EngineStats
from octavo.protocol.generate import GenerateRequest, TokenDelta

ProgressCall = Callable[[str, int, int], None]  # phase, done, total


class Start(msgspec.Struct, tag="start"):
    """The first message: what to build, in the builder's own format."""

    options: bytes


class Submit(msgspec.Struct, tag="submit"):
    """A request."""

    request: GenerateRequest


class Abort(msgspec.Struct, tag="abort"):
    """End requests."""

    ids: list[int]


class Order(msgspec.Struct, tag="order"):
    """A control command; ``number`` comes back with the answer."""

    number: int
    command: Control


class Join(msgspec.Struct, tag="join"):
    """Another front process, whose ids and orders begin at ``front << FRONT_SHIFT``; it gets ``Ready`` at its own socket."""

    front: int


ToEngine = Start | Submit | Abort | Order | Join


class Progress(msgspec.Struct, tag="progress"):
    """The start goes on: ``done`` of ``total`` units of a phase."""

    phase: str
    done: int
    total: int


class Ready(msgspec.Struct, tag="ready"):
    """The engine takes requests."""

    info: EngineInfo


class Deltas(msgspec.Struct, tag="deltas"):
    """All deltas of one step."""

    deltas: list[TokenDelta]


class Answer(msgspec.Struct, tag="answer"):
    """The answer to an order; at most one of info, stats and error is set."""

    number: int
    info: EngineInfo | None = None
    stats: EngineStats | None = None
    error: str | None = None

    @property
    def reply(self) -> ControlReply:
        """What the command returned."""
        return self.info or self.stats


FromEngine = Progress | Ready | Failed | Deltas | Answer
