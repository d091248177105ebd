"""The two sockets between a front process and an engine's process, in a private folder, and the process itself.

<folder>/requests    the front that starts the engine binds, the engine connects
<folder>/results     the same
<folder>/fronts      the engine binds, every other front connects and says ``Join``
<folder>/results-K   front K binds, the engine connects
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Mapping, Sequence

import msgspec
import zmq

from octavo.engine.client import messages
from octavo.engine.process import end_child
from octavo.errors import UsageError

log = logging.getLogger("octavo.engine")

MAX_SOCKET_PATH = 100  # the kernel's limit is 104 (macOS) or 108 (Linux) bytes
LONGEST_NAME = len("/results-99999")


class Pipe:
    """Messages to the engine and back; never blocks."""

    owns_engine = False

    def __init__(self, folder: str) -> None:
        if not zmq.has("ipc"):
            raise UsageError("This platform has no unix sockets.", "Run the engine in this process.")
        self.folder = folder
        self.address = f"ipc://{folder}"
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.requests, self.results = self._socket(zmq.PUSH), self._socket(zmq.PULL)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(messages.FromEngine).decode

    @classmethod
    def join(cls, folder: str, front: int) -> Pipe:
        """To an engine that another front process has started."""
        pipe = cls(folder)
        pipe.results.bind(f"{pipe.address}/results-{front}")
        pipe.requests.connect(f"{pipe.address}/fronts")
        pipe.send(messages.Join(front))
        return pipe

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self.context.socket(kind)
        # No high-water mark: Sinks bounds open requests, and a full queue must not block the event loop.
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.LINGER, 0)
        return socket

    @property
    def ended(self) -> str | None:
        """How the engine's process ended; None where it has not, or nobody here can tell."""
        return None

    def send(self, message: messages.ToEngine) -> None:
        """Queue a message; returns at once."""
        try:
            self.requests.send(self._encode(message), zmq.NOBLOCK)
        except (
            zmq.Again
        ):  # a PUSH socket without its peer: the process is gone, and whoever watches it will say so
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
        """Close the sockets."""
        self.context.destroy(linger=0)


class Channel(Pipe):
    """A pipe to an engine in a child process, which it starts: ``command`` with the folder's address behind it.

    Made early, so that the child can import what it needs while this process gets ready to ask for an engine.
    """

    owns_engine = True

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        folder = tempfile.mkdtemp(prefix="octavo-")  # mode 0700
        if len(folder) > MAX_SOCKET_PATH - LONGEST_NAME:
            shutil.rmtree(folder)
            folder = tempfile.mkdtemp(prefix="octavo-", dir="/tmp")
        self.cleanup = weakref.finalize(self, shutil.rmtree, folder, True)
        super().__init__(folder)
        self.requests.bind(f"{self.address}/requests")
        self.results.bind(f"{self.address}/results")
        self.process = subprocess.Popen([*command, self.address], stdin=subprocess.PIPE, env=environment)

    @property
    def ended(self) -> str | None:
        """See ``Pipe``."""
        if self.process.poll() is None:
            return None
        return f"The engine process ended with status {self.process.returncode}"

    def stop(self, timeout_s: float) -> None:
        """End the process (it gets ``timeout_s`` to go by itself) and free everything."""
        end_child(self.process, timeout_s)
        super().stop(0)
        self.cleanup()
