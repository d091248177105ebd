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
from octavo.engine.client.sinks import refusal
from octavo.engine.core import EngineCore
from octavo.engine.process import Failed, live_with_parent
from octavo.errors import OctavoError
from octavo.protocol.control import Control, EngineInfo, EngineStats

log = logging.getLogger("octavo.engine")

ProgressCall = Callable[[str, int, int], None]  # phase, done, total
Build = Callable[[bytes, ProgressCall], EngineCore]


def run_engine(address: str, build: Build) -> int:
    """Connect to the client that listens at ``address``, build the engine from its options, serve until told to stop.

    Returns the process's exit status.
    """
    live_with_parent(address.removeprefix("ipc://"))
    context = zmq.Context()
    requests, results = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    for socket in (requests, results):
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.LINGER, 2000)
    requests.connect(f"{address}/requests")
    results.connect(f"{address}/results")
    try:
        return EngineProcess(requests, results).run(build)
    finally:
        context.destroy(linger=2000)


class EngineProcess:
    """The loop over two sockets."""

    def __init__(self, requests: zmq.Socket[bytes], results: zmq.Socket[bytes]) -> None:
        self._requests = requests
        self._results = results
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(messages.ToEngine).decode

    def run(self, build: Build) -> int:
        """Build and loop; failures are reported to the client."""
        core = None
        try:
            start = self._decode(self._requests.recv())
            if not isinstance(start, messages.Start):
                raise OctavoError(f"The first message was {type(start).__name__}, not Start.")
            core = build(start.options, self._progress)
            gc.collect()
            gc.freeze()  # what exists now stays; the collector need not look at it in the middle of a step
            self._send(messages.Ready(core.info))
            self._loop(core)
        except Exception as error:
            if not isinstance(error, OctavoError):
                log.exception("The engine failed.")
            self._send(Failed.of(error))
            return 1
        finally:
            if core is not None:
                core.close()
        return 0

    def _loop(self, core: EngineCore) -> None:
        while not core.stopping or core.has_work:
            self._drain(core)
            if core.has_work:
                deltas = core.step()
                if deltas:
                    self._send(messages.Deltas(deltas))

    def _drain(self, core: EngineCore) -> None:
        """Take every message that is there; an idle engine sleeps here."""
        flags = zmq.NOBLOCK if core.has_work else 0
        while True:
            try:
                message = self._decode(self._requests.recv(flags))
            except zmq.Again:
                return
            self._handle(core, message)
            flags = zmq.NOBLOCK

    def _handle(self, core: EngineCore, message: messages.ToEngine) -> None:
        if isinstance(message, messages.Submit):
            try:
                core.submit(message.request)
            except OctavoError as error:
                self._send(messages.Deltas([refusal(message.request.id, error)]))
        elif isinstance(message, messages.Abort):
            core.abort(message.ids)
        elif isinstance(message, messages.Order):
            self._send(_answer(core, message.number, message.command))

    def _progress(self, phase: str, done: int, total: int) -> None:
        self._send(messages.Progress(phase, done, total))

    def _send(self, message: messages.FromEngine) -> None:
        self._results.send(self._encode(message))


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
