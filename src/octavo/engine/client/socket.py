"""The engine in its own process, over ZeroMQ on a private folder's unix sockets.

    this process                                    the engine's process (client/serve.py)
    PUSH <folder>/requests   Start Submit Abort Order   ──>
    PULL <folder>/results    <── Progress Ready Deltas Answer Failed, one message a step for all requests
    its standard input       held open; closed = we are gone
    its exit status          a thread waits for it; exit = every open request ends with "error"

There is no network address: the folder is readable by this user alone.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence

import msgspec
import zmq

from octavo.engine.client import messages
from octavo.engine.client.base import Sink
from octavo.engine.client.serve import ProgressCall
from octavo.engine.client.sinks import Sinks
from octavo.engine.process import Failed
from octavo.errors import EngineDeadError, OctavoError, UsageError
from octavo.protocol.control import Control, ControlReply, EngineInfo, Shutdown
from octavo.protocol.generate import FinishReason, GenerateRequest

log = logging.getLogger("octavo.engine")

MAX_SOCKET_PATH = 100  # the kernel's limit is 104 (macOS) or 108 (Linux) bytes
CLOSE_S = 10.0  # how long the engine may take to stop before it is killed


class Channel:
    """The folder, the two sockets and the child process."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        if not zmq.has("ipc"):
            raise UsageError("This platform has no unix sockets.", "Run the engine in this process.")
        folder = tempfile.mkdtemp(prefix="octavo-")  # mode 0700
        if len(folder) > MAX_SOCKET_PATH - len("/requests"):
            shutil.rmtree(folder)
            folder = tempfile.mkdtemp(prefix="octavo-", dir="/tmp")
        self.folder = folder
        self.cleanup = weakref.finalize(self, shutil.rmtree, folder, True)
        address = f"ipc://{folder}"
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.requests = self._bind(zmq.PUSH, f"{address}/requests")
        self.results = self._bind(zmq.PULL, f"{address}/results")
        self.process = subprocess.Popen([*command, address], stdin=subprocess.PIPE, env=environment)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(messages.FromEngine).decode

    def _bind(self, kind: int, address: str) -> zmq.Socket[bytes]:
        socket = self.context.socket(kind)
        # No high-water mark: Sinks bounds open requests, and a full queue must not block the event loop.
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(address)
        return socket

    def send(self, message: messages.ToEngine) -> None:
        """Queue a message; returns at once."""
        try:
            self.requests.send(self._encode(message), zmq.NOBLOCK)
        except zmq.Again:  # a PUSH socket without its peer: the process is gone, and the waiter will say so
            log.debug("The engine is gone; a message was dropped.")

    def receive(self) -> messages.FromEngine | None:
        """The next message, or None where none has come yet."""
        try:
            frame = self.results.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        message: messages.FromEngine = self._decode(frame)
        return message

    def stop(self, timeout_s: float) -> None:
        """End the process (it gets ``timeout_s`` to go by itself) and free everything."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.context.destroy(linger=0)
        self.cleanup()


class SocketClient:
    """Implements ``EngineClient`` over a child process; made by ``launch``."""

    def __init__(self, channel: Channel, info: EngineInfo) -> None:
        self.info = info
        self.alive = True
        self._channel = channel
        self._sinks = Sinks(info)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._orders: dict[int, asyncio.Future[ControlReply]] = {}
        self._next_order = 0
        self._closed = False
        threading.Thread(target=self._wait_for_exit, name="octavo-engine-exit", daemon=True).start()

    @classmethod
    def launch(
        cls,
        command: Sequence[str],
        options: bytes,
        progress: ProgressCall | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        cancel: threading.Event | None = None,
    ) -> SocketClient:
        """Start ``command`` with the address as its last argument and wait until the engine is ready.

        ``options`` is handed to the child's ``build``. Raises the child's own ``OctavoError`` where the start
        fails, ``EngineDeadError`` where the process ends without a word or ``cancel`` is set meanwhile.
        """
        channel = Channel(command, environment)
        try:
            started = False
            while True:
                if cancel is not None and cancel.is_set():
                    raise EngineDeadError("The start was cancelled.")
                if not started and channel.requests.poll(0, zmq.POLLOUT):  # the child has connected
                    channel.send(messages.Start(options))
                    started = True
                ended = channel.process.poll() is not None  # before receive: its last words come first
                channel.results.poll(100 if started else 10)
                message = channel.receive()
                if isinstance(message, messages.Ready):
                    return cls(channel, message.info)
                if isinstance(message, messages.Progress) and progress is not None:
                    progress(message.phase, message.done, message.total)
                elif isinstance(message, Failed):
                    raise message.error()
                elif message is None and ended:
                    raise EngineDeadError(
                        f"The engine process ended with status {channel.process.returncode} before it was ready.",
                        "Its messages above say why.",
                    )
        except BaseException:
            channel.stop(0 if channel.process.poll() is None else 1)
            raise

    @property
    def pid(self) -> int:
        """The engine's process id."""
        return self._channel.process.pid

    def kill(self) -> None:
        """End the engine before it was used."""
        self._closed = True
        self._channel.stop(0)

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        """See ``EngineClient.submit``."""
        self._attach()
        if not self.alive and self._sinks.reason_dead is None:  # it ended this very moment
            self._exited(self._channel.process.returncode)
        self._sinks.add(request, sink)
        self._channel.send(messages.Submit(request))

    def abort(self, ids: list[int]) -> None:
        """See ``EngineClient.abort``."""
        open_ids = self._sinks.remove(ids)
        if open_ids and not self._closed:
            self._channel.send(messages.Abort(open_ids))

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
            self._channel.send(messages.Order(number, command))
            return await answer
        finally:
            self._orders.pop(number, None)

    async def close(self) -> None:
        """Stop the engine's process; requests still open end with finish_reason "abort"."""
        if self._closed:
            return
        loop = self._attach()
        self._closed = True
        if self.alive:
            self._channel.send(messages.Order(0, Shutdown()))
        loop.remove_reader(self._channel.results.fileno())
        # The sockets may be destroyed only when the process is gone, else the order to stop is lost.
        await loop.run_in_executor(None, self._channel.stop, CLOSE_S)
        self.alive = False
        self._end("abort", "The engine was closed.")

    # -- receiving ----------------------------------------------------------------------------------------------

    def _attach(self) -> asyncio.AbstractEventLoop:
        """Read results on the running event loop (the first one that uses the client, or a later one)."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop and not self._closed:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(self._channel.results.fileno())
            self._loop = loop
            loop.add_reader(self._channel.results.fileno(), self._read)
            loop.call_soon(self._read)  # the descriptor only tells of changes from now on
            if not self.alive:  # it ended before there was a loop to tell
                loop.call_soon(self._exited, self._channel.process.returncode)
        return loop

    def _read(self) -> None:
        """Handle every message that has come; ZeroMQ's descriptor wakes once for many."""
        while not self._closed:
            message = self._channel.receive()
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

    def _wait_for_exit(self) -> None:
        """A thread of its own: notices the end of the process at once, also before anybody submits."""
        status = self._channel.process.wait()
        self.alive = False
        loop = self._loop
        if loop is None:
            self._sinks.reason_dead = f"The engine process has ended with status {status}."
            return
        try:
            loop.call_soon_threadsafe(self._exited, status)
        except RuntimeError:
            log.debug("The event loop closed before the engine ended.")

    def _exited(self, status: int) -> None:
        if self._closed:  # as asked; close() tells the sinks
            return
        self._read()  # its last words
        self._end("error", f"The engine process has ended with status {status}.")

    def _end(self, reason: FinishReason, message: str) -> None:
        self._sinks.end_all(reason, message)
        for answer in self._orders.values():
            if not answer.done():
                answer.set_exception(EngineDeadError(message))
