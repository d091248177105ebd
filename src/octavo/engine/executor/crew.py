"""The processes of one machine's ranks, the ring that they read, and how one speaks to ranks anywhere."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from octavo.engine.executor.frames import Build, FromWorker, Unbuffered, frame, read_frame
from octavo.engine.executor.ring import RingWriter, open_memory
from octavo.engine.process import end_child

STOP_S = 5.0  # how long a worker may take to stop before it is killed
SPIN_S, SHORT_SPIN_S = 0.002, 0.00005  # how long workers look for the next plan before they sleep
# What sums over devices use must not depend on multicast, which not every machine with NVLink grants.
NO_MULTICAST = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0"}
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


class Speaker(Protocol):
    """One or several ranks behind one socket."""

    ranks: Sequence[int]
    socket: socket.socket  # what to wait for

    def read(self) -> tuple[int, FromWorker | None]:
        """A rank's next message; None where it is gone."""

    def status(self) -> str:
        """How it ended."""

    def kill(self) -> None:
        """End it now; does not wait."""

    def stop(self, wait_s: float) -> None:
        """Wait for its end, at most so long, then bring it about; frees everything."""


class Node(Speaker, Protocol):
    """Ranks of another machine, or of another process of this one."""

    heard: int  # how many frames have come; they do while its agent runs

    def write(self, payload: bytes) -> None:
        """Pass a frame on to its workers."""


def start_process(
    connection: int, memory: int, folder: str, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """A worker's process; both descriptors become its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "octavo.engine.executor.worker", str(connection), str(memory), folder],
        pass_fds=[connection, memory],
        stdin=subprocess.PIPE,
        env=dict(environment),
    )


class Worker:
    """A child process and our end of its socket."""

    def __init__(self, rank: int, memory: int, folder: str, environment: Mapping[str, str]) -> None:
        self.ranks: Sequence[int] = (rank,)
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = start_process(theirs.fileno(), memory, folder, environment)
        self.socket = ours
        self.stream = Unbuffered(ours)
        self._decode = msgspec.msgpack.Decoder(FromWorker).decode

    def read(self) -> tuple[int, FromWorker | None]:
        """See ``Speaker``."""
        try:
            payload = read_frame(self.stream)
        except (EOFError, OSError):
            return self.ranks[0], None
        return self.ranks[0], self._decode(payload)

    def send(self, payload: bytes) -> None:
        """A frame or a wake-up; a worker that is gone is noticed when it is listened to."""
        try:
            self.socket.sendall(payload)
        except OSError:
            return

    def status(self) -> str:
        """See ``Speaker``."""
        try:
            return str(self.process.wait(1))
        except subprocess.TimeoutExpired:
            return "unknown"

    def kill(self) -> None:
        """See ``Speaker``."""
        self.process.kill()

    def stop(self, wait_s: float) -> None:
        """See ``Speaker``."""
        end_child(self.process, wait_s)
        self.socket.close()


class Crew:
    """The workers that this process has started: ranks ``first`` and up, and the ring that they read.

    On their machine, which has ``num_local`` ranks (default: these), the first of them is number ``first_index``.
    """

    def __init__(
        self,
        num_workers: int,
        first: int = 0,
        environment: Mapping[str, str] | None = None,
        *,
        first_index: int = 0,
        num_local: int | None = None,
        after: Callable[[], None] | None = None,
    ) -> None:
        """``after`` is called when all is closed."""
        self.workers: list[Worker] = []
        self._after = after
        self.first_index = first_index
        self.num_local = num_local or num_workers
        self.folder = tempfile.mkdtemp(prefix="octavo-")  # mode 0700
        self.cleanup = weakref.finalize(self, shutil.rmtree, self.folder, True)
        self.memory = open_memory(num_workers)
        self.ring = RingWriter(self.memory, num_workers, self._wake, self._nothing)
        whole = {**NO_MULTICAST, **os.environ, **(environment or {})}
        try:
            for index in range(num_workers):
                self.workers.append(Worker(first + index, self.memory, self.folder, whole))
        except BaseException:
            self.close(0)
            raise

    def build(self, factory: str, arguments: Mapping[str, Any], num_ranks: int) -> None:
        """Tell every worker what to make."""
        encode = msgspec.msgpack.Encoder().encode
        packed = json.dumps(arguments).encode()
        count = len(self.workers)
        spin_s = SPIN_S if (os.cpu_count() or 1) > 2 * self.num_local else SHORT_SPIN_S
        for index, worker in enumerate(self.workers):
            build = Build(
                factory,
                packed,
                worker.ranks[0],
                num_ranks,
                index,
                count,
                spin_s,
                self.first_index + index,
                self.num_local,
            )
            worker.send(frame(encode(build)))

    def beats(self) -> dict[int, int]:
        """How often each rank has shown that it runs."""
        return {worker.ranks[0]: self.ring.beats(index) for index, worker in enumerate(self.workers)}

    def close(self, wait_s: float) -> None:
        """Wait for the workers' ends, or bring them about."""
        for worker in self.workers:
            worker.stop(wait_s)
        self.ring.close()
        os.close(self.memory)
        self.cleanup()
        if self._after is not None:
            self._after()

    def _wake(self, index: int) -> None:
        self.workers[index].send(b"\0")

    def _nothing(self) -> None:
        """Replaced by whoever listens to the workers."""
