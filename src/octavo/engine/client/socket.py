"""The engine in its own process, over ZeroMQ on a private folder's unix sockets.

    this process                                    the engine's process (client/serve.py)
    PUSH <folder>/requests   Start Submit Abort Order   ──>
    PULL <folder>/results    <── Progress Ready Deltas Answer Failed, one message a step for all requests
    its standard input       held open; closed = we are gone
    its exit status          a thread waits for it; exit = every open request ends with "error"

Further front processes ``join`` the engine that one of them has launched (the sockets: ``channel.py``). There is no network address: the folder is readable by this user alone.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping, Sequence

import zmq

from octavo.engine.client import messages
from octavo.engine.client.base import Sink
from octavo.engine.client.channel import Channel, Pipe
from octavo.engine.client.messages import ProgressCall
from octavo.engine.client.sinks import Sinks
from octavo.engine.process import Failed
from octavo.errors import EngineDeadError, OctavoError
from octavo.protocol.control import FRONT_SHIFT, Control, ControlReply, EngineInfo, Shutdown
from octavo.protocol.generate import FinishReason, GenerateRequest

log = logging.getLogger("octavo.engine")

CLOSE_S = 10.0  # how long the engine may take to stop before it is killed


class SocketClient:
    """Implements ``EngineClient`` over a process; made by ``launch`` or ``join``."""

    def __init__(self, pipe: Pipe, info: EngineInfo, front: int = 0) -> None:
        self.info = info
        self.alive = True
        self._pipe = pipe
        self._sinks = Sinks(info)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._orders: dict[int, asyncio.Future[ControlReply]] = {}
        self._next_order = front << FRONT_SHIFT
        self._gone: str | None = None
        self._closed = False

    @classmethod
    def launch(
        cls,
        command: Sequence[str] | Channel,
        options: bytes,
        progress: ProgressCall | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        cancel: threading.Event | None = None,
    ) -> SocketClient:
        """Have a child build an engine from ``options`` and wait until it is ready; the child is that of a channel made
        before, or ``command`` with the address as its last argument.

        Raises the child's own ``OctavoError`` where the start fails, ``EngineDeadError`` where the process ends without
        a word or ``cancel`` is set meanwhile; the process is gone then.
        """
        channel = command if isinstance(command, Channel) else Channel(command, environment)
        try:
            while not channel.requests.poll(20, zmq.POLLOUT) and channel.ended is None:  # until it connects
                _check_cancelled(cancel)
            channel.send(messages.Start(options))
            client = cls(channel, await_ready(channel, progress, cancel))
        except BaseException:
            channel.stop(0 if channel.ended is None else 1)
            raise
        threading.Thread(
            target=client._wait_for_exit, args=(channel,), name="octavo-engine-exit", daemon=True
        ).start()
        return client

    @classmethod
    def join(cls, folder: str, front: int) -> SocketClient:
        """A further front process's client of the engine in ``folder``; waits until that is ready.

        It cannot see the engine's end: whoever started that says so by ``lost``.
        """
        pipe = Pipe.join(folder, front)
        return cls(pipe, await_ready(pipe, None, None), front)

    @property
    def folder(self) -> str:
        """Where other front processes find this engine (see ``join``)."""
        return self._pipe.folder

    @property
    def pid(self) -> int:
        """The engine's process id; 0 where another process has started it."""
        return self._pipe.process.pid if isinstance(self._pipe, Channel) else 0

    def kill(self) -> None:
        """End the engine before it was used."""
        self._closed = True
        self._pipe.stop(0)

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        """See ``EngineClient.submit``."""
        self._attach()
        if not self.alive and self._sinks.reason_dead is None:  # it ended this very moment
            self._end_lost()
        self._sinks.add(request, sink)
        self._pipe.send(messages.Submit(request))

    def abort(self, ids: list[int]) -> None:
        """See ``EngineClient.abort``."""
        open_ids = self._sinks.remove(ids)
        if open_ids and not self._closed:
            self._pipe.send(messages.Abort(open_ids))

    async def control(self, command: Control) -> ControlReply:
        """See ``EngineClient.control``; a command that fails raises ``OctavoError`` with its message."""
        if not self.alive or self._closed:
            raise EngineDeadError(self._sinks.reason_dead or "The engine has stopped.")
        loop = self._attach()
        self._next_order += 1
        answer: asyncio.Future[ControlReply] = loop.create_future()
        number = self._next_order
        self._orders[number] = answer
        try:
            self._pipe.send(messages.Order(number, command))
            return await answer
        finally:
            self._orders.pop(number, None)

    async def close(self) -> None:
        """Stop the engine's process; requests still open end with finish_reason "abort"."""
        if self._closed:
            return
        loop = self._attach()
        self._closed = True
        if self.alive and self._pipe.owns_engine:
            self._pipe.send(messages.Order(0, Shutdown()))
        loop.remove_reader(self._pipe.results.fileno())
        # The sockets may be destroyed only when the process is gone, else the order to stop is lost.
        await loop.run_in_executor(None, self._pipe.stop, CLOSE_S)
        self.alive = False
        self._end("abort", "The engine was closed.")

    # -- receiving ----------------------------------------------------------------------------------------------

    def _attach(self) -> asyncio.AbstractEventLoop:
        """Read results on the running event loop (the first one that uses the client, or a later one)."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop and not self._closed:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(self._pipe.results.fileno())
            self._loop = loop
            loop.add_reader(self._pipe.results.fileno(), self._read)
            loop.call_soon(self._read)  # the descriptor only tells of changes from now on
            if not self.alive:  # it ended before there was a loop to tell
                loop.call_soon(self._end_lost)
        return loop

    def _read(self) -> None:
        """Handle every message that has come; ZeroMQ's descriptor wakes once for many."""
        while not self._closed:
            message = self._pipe.receive()
            if message is None:
                return
            if isinstance(message, messages.Deltas):
                self._sinks.deliver(message.deltas)
            elif isinstance(message, messages.Answer):
                self._answered(message)
            elif isinstance(message, Failed):
                self.alive = False
                self._end("error", str(message.error()))

    def _answered(self, message: messages.Answer) -> None:
        answer = self._orders.get(message.number)
        if answer is None or answer.done():
            return
        if message.error is not None:
            answer.set_exception(OctavoError(message.error))
        else:
            answer.set_result(message.reply)

    def _wait_for_exit(self, channel: Channel) -> None:
        """A thread of its own: notices the end of the process at once, also before anybody submits."""
        status = channel.process.wait()
        self.lost(f"The engine process has ended with status {status}.")

    def lost(self, reason: str) -> None:
        """The engine is gone; may be called by any thread."""
        self._gone = reason
        self.alive = False
        loop = self._loop
        if loop is None:
            self._sinks.reason_dead = reason
            return
        try:
            loop.call_soon_threadsafe(self._end_lost)
        except RuntimeError:
            log.debug("The event loop closed before the engine ended.")

    def _end_lost(self) -> None:
        if self._closed:  # as asked; close() tells the sinks
            return
        self._read()  # its last words
        self._end("error", self._gone or "The engine has stopped.")

    def _end(self, reason: FinishReason, message: str) -> None:
        self._sinks.end_all(reason, message)
        for answer in self._orders.values():
            if not answer.done():
                answer.set_exception(EngineDeadError(message))


def await_ready(pipe: Pipe, progress: ProgressCall | None, cancel: threading.Event | None) -> EngineInfo:
    """Wait for the engine, which tells how far it is."""
    while True:
        _check_cancelled(cancel)
        ended = pipe.ended  # before receive: its last words come first
        pipe.results.poll(100)
        message = pipe.receive()
        if isinstance(message, messages.Ready):
            return message.info
        if isinstance(message, messages.Progress) and progress is not None:
            progress(message.phase, message.done, message.total)
        elif isinstance(message, Failed):
            raise message.error()
        elif message is None and ended is not None:
            raise EngineDeadError(f"{ended} before it was ready.", "Its messages above say why.")


def _check_cancelled(cancel: threading.Event | None) -> None:
    if cancel is not None and cancel.is_set():
        raise EngineDeadError("The start was cancelled.")
