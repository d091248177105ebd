"""The engine's own process: build, report, loop. The other end is ``client/socket.py``.

The process ends when it is told to, when it fails, or when its parent is gone (``process.live_with_parent``).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

import msgspec
import zmq

from octavo.engine.cache.pool import PoolError
from octavo.engine.client import messages
from octavo.engine.client.messages import ProgressCall
from octavo.engine.client.sinks import refusal
from octavo.engine.core import EngineCore
from octavo.engine.process import Failed, live_with_parent
from octavo.errors import OctavoError
from octavo.protocol.control import FRONT_SHIFT, Control, DropFront, EngineInfo, EngineStats
from octavo.protocol.generate import TokenDelta

log = logging.getLogger("octavo.engine")

WATCH_MS = 1000

Build = Callable[[bytes, ProgressCall], EngineCore]


def run_engine(address: str, build: Build, prepare: Callable[[], None] | None = None) -> int:
    """Connect to the client that listens at ``address``, build the engine from its options, serve until told to stop.

    ``prepare`` is called before the options are there: for imports, which can go on while the client gets ready.
    Returns the process's exit status.
    """
    live_with_parent(address.removeprefix("ipc://"))
    context = zmq.Context()
    requests, results = _socket(context, zmq.PULL), _socket(context, zmq.PUSH)
    requests.connect(f"{address}/requests")
    requests.bind(f"{address}/fronts")
    results.connect(f"{address}/results")
    try:
        return EngineProcess(address, context, requests, results).run(build, prepare)
    finally:
        context.destroy(linger=2000)


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 2000)
    return socket


class EngineProcess:
    """The loop over the sockets. Front process 0 is the one that started this; others come and go."""

    def __init__(
        self,
        address: str,
        context: zmq.Context[zmq.Socket[bytes]],
        requests: zmq.Socket[bytes],
        results: zmq.Socket[bytes],
    ) -> None:
        self._address = address
        self._context = context
        self._requests = requests
        self._fronts = {0: results}
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(messages.ToEngine).decode

    def run(self, build: Build, prepare: Callable[[], None] | None = None) -> int:
        """Build and loop; failures are reported to the clients."""
        core = None
        try:
            if prepare is not None:
                prepare()
            core = build(self._start(), self._progress)
            gc.collect()
            gc.freeze()  # what exists now stays; the collector need not look at it in the middle of a step
            self._send(messages.Ready(core.info))
            self._loop(core)
        except Exception as error:
            if not isinstance(error, OctavoError):
                log.exception("The engine failed.")
            for front in self._fronts:
                self._send(Failed.of(error), front)
            return 1
        finally:
            if core is not None:
                core.close()
        return 0

    def _start(self) -> bytes:
        """The options; fronts that join before they have come are answered when the engine is ready."""
        while True:
            message = self._decode(self._requests.recv())
            if isinstance(message, messages.Start):
                return message.options
            if not isinstance(message, messages.Join):
                raise OctavoError(f"The first message was {type(message).__name__}, not Start.")
            self._add(message.front)

    def _loop(self, core: EngineCore) -> None:
        for front in list(self._fronts)[1:]:
            self._send(messages.Ready(core.info), front)
        while not core.stopping or core.has_work:
            self._drain(core)
            if core.has_work:
                deltas = core.step()
                if deltas:
                    self._deliver(deltas)

    def _deliver(self, deltas: list[TokenDelta]) -> None:
        """One message for every front process that has deltas in this step."""
        if len(self._fronts) == 1:
            self._send(messages.Deltas(deltas))
            return
        by_front: dict[int, list[TokenDelta]] = {}
        for delta in deltas:
            by_front.setdefault(delta.id >> FRONT_SHIFT, []).append(delta)
        for front, mine in by_front.items():
            self._send(messages.Deltas(mine), front)

    def _drain(self, core: EngineCore) -> None:
        """Take every message that is there; an idle engine sleeps here, and looks after its workers."""
        while not core.has_work and not self._requests.poll(WATCH_MS):
            core.executor.watch()
        while True:
            try:
                message = self._decode(self._requests.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            self._handle(core, message)

    def _handle(self, core: EngineCore, message: messages.ToEngine) -> None:
        if isinstance(message, messages.Submit):
            request = message.request
            try:
                core.submit(request)
            except OctavoError as error:
                self._send(messages.Deltas([refusal(request.id, error)]), request.id >> FRONT_SHIFT)
        elif isinstance(message, messages.Abort):
            core.abort(message.ids)
        elif isinstance(message, messages.Order):
            if isinstance(message.command, DropFront):
                self._drop(message.command.front)
            self._send(_answer(core, message.number, message.command), message.number >> FRONT_SHIFT)
        elif isinstance(message, messages.Join):
            self._add(message.front)
            self._send(messages.Ready(core.info), message.front)

    def _add(self, front: int) -> None:
        socket = self._fronts[front] = _socket(self._context, zmq.PUSH)
        socket.connect(f"{self._address}/results-{front}")

    def _drop(self, front: int) -> None:
        socket = self._fronts.pop(front, None) if front else None
        if socket is not None:
            socket.close(linger=0)

    def _progress(self, phase: str, done: int, total: int) -> None:
        self._send(messages.Progress(phase, done, total))

    def _send(self, message: messages.FromEngine, front: int = 0) -> None:
        socket = self._fronts.get(front)
        if socket is not None:  # else it is gone, and nobody waits
            socket.send(self._encode(message))


def _answer(core: EngineCore, number: int, command: Control) -> messages.Answer:
    try:
        reply = core.control(command)
    except (OctavoError, PoolError) as error:
        return messages.Answer(number, error=str(error))
    return messages.Answer(
        number,
        info=reply if isinstance(reply, EngineInfo) else None,
        stats=reply if isinstance(reply, EngineStats) else None,
    )
