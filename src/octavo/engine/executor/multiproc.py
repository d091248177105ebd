"""Workers in processes of their own, one a device: every plan goes to all through shared memory, rank 0 answers.

    engine                     ring, read by all     worker 0            worker 1
    forward(plan)   ──Forward──>  ││││││││  ──>       runner.forward      runner.forward
    sample(masks)   ──Sample───>  ││││││││  ──>       runner.sample       runner.sample
    collect()       ──Collect──>  ││││││││  ──>       runner.collect      runner.collect
                    <──Result────────────────────────── socket

A worker that ends or fails is seen at the next call as the end of its socket, also while another worker waits for
it in vain, and becomes ``EngineDeadError`` (or the worker's own error while it starts); the others are killed at once,
since they may wait for the dead one on their devices for ever. Further machines speak through a ``Node`` each.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from octavo.engine.cache.layout import CacheLayout
from octavo.engine.executor.frames import (
    Build,
    Collect,
    Forward,
    FromWorker,
    Hello,
    Progress,
    Result,
    Sample,
    Stop,
    ToWorker,
    Unbuffered,
    frame,
    read_frame,
    unpack_layout,
)
from octavo.engine.executor.ring import RingWriter, open_memory
from octavo.engine.process import Failed
from octavo.errors import EngineDeadError, OctavoError
from octavo.protocol.plan import GrammarMask, StepPlan, StepResult

STOP_S = 5.0  # how long a worker may take to stop before it is killed
SILENCE_S = 300.0
LAST_WORDS_S = 0.3
SPIN_S, SHORT_SPIN_S = 0.002, 0.00005  # how long workers look for the next plan before they sleep
# What sums over devices use must not depend on multicast, which not every machine with NVLink grants.
NO_MULTICAST = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0"}
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}

ProgressCall = Callable[[str, int, int], None]  # phase, done, in all


class Speaker(Protocol):
    """One or several ranks behind one socket."""

    @property
    def ranks(self) -> Sequence[int]:
        """Which."""

    @property
    def socket(self) -> socket.socket:
        """What to wait for."""

    def read(self) -> tuple[int, FromWorker | None]:
        """A rank's next message; None where it is gone."""

    def status(self) -> str:
        """How it ended."""

    def kill(self) -> None:
        """End it now; does not wait."""

    def stop(self, wait_s: float) -> None:
        """Wait for its end, at most so long, then bring it about; frees everything."""


class Node(Speaker, Protocol):
    """Ranks of another machine."""

    def write(self, payload: bytes) -> None:
        """Pass a frame on to its workers."""


class Worker:
    """A child process and our end of its socket."""

    def __init__(self, rank: int, memory: int, folder: str, environment: Mapping[str, str]) -> None:
        self.ranks = (rank,)
        ours, theirs = socket.socketpair()
        with theirs:
            fds = [theirs.fileno(), memory]
            self.process = subprocess.Popen(
                [sys.executable, "-m", "octavo.engine.executor.worker", *map(str, fds), folder],
                pass_fds=fds,
                stdin=subprocess.PIPE,
                env=dict(environment),
            )
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
        try:
            self.process.wait(wait_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.socket.close()


class Crew:
    """The workers of one machine: ranks ``first`` and up, and the ring that they read."""

    def __init__(
        self, num_workers: int, first: int = 0, environment: Mapping[str, str] | None = None
    ) -> None:
        self.workers: list[Worker] = []
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
        spin_s = SPIN_S if (os.cpu_count() or 1) > 2 * count else SHORT_SPIN_S
        for index, worker in enumerate(self.workers):
            build = Build(factory, packed, worker.ranks[0], num_ranks, index, count, spin_s)
            worker.send(frame(encode(build)))

    def close(self, wait_s: float) -> None:
        """Wait for the workers' ends, or bring them about."""
        for worker in self.workers:
            worker.stop(wait_s)
        self.ring.close()
        os.close(self.memory)
        self.cleanup()

    def _wake(self, index: int) -> None:
        self.workers[index].send(b"\0")

    def _nothing(self) -> None:
        """Replaced by whoever listens to the workers."""


class MultiprocExecutor:
    """Implements ``Executor`` over worker processes.

    ``factory`` is ``module:function`` of an ``executor.base.Factory``; ``arguments`` must be JSON. The cache has as many
    pages as the worker with the fewest. ``nodes`` waits for other machines, whose ranks follow this one's; it calls what it
    is given, which raises where a worker here has failed meanwhile. ``silence_s``: a rank that says nothing for so long
    while it starts, or while a step is waited for, has failed.
    """

    def __init__(
        self,
        factory: str,
        arguments: dict[str, Any],
        *,
        num_workers: int = 1,
        environment: Mapping[str, str] | None = None,
        num_ranks: int | None = None,
        nodes: Callable[[Callable[[], None]], Sequence[Node]] | None = None,
        silence_s: float = SILENCE_S,
        progress: ProgressCall | None = None,
    ) -> None:
        self._encode = msgspec.msgpack.Encoder().encode
        self._closed = False
        self._started = False
        self._silence_s = silence_s
        self._progress = progress
        self._nodes: list[Node] = []
        self._crew = Crew(num_workers, environment=environment)
        self._crew.ring.check = self._check_others
        try:
            self._crew.build(factory, arguments, num_ranks or num_workers)
            if nodes is not None:
                self._nodes.extend(nodes(self._check_start))
            hellos = self._greetings()
        except BaseException:
            self._kill()
            self._release(STOP_S)
            raise
        first = hellos[0]
        self.layout: CacheLayout = unpack_layout(first.layout)
        self.num_pages = min(hello.num_pages for hello in hellos.values())
        self.num_slots = min(hello.num_slots for hello in hellos.values())
        self.facts = first.facts
        self._started = True

    @property
    def pids(self) -> list[int]:
        """The process ids of this machine's workers, by rank."""
        return [worker.process.pid for worker in self._crew.workers]

    def forward(self, plan: StepPlan) -> None:
        """See ``Executor.forward``."""
        self._broadcast(Forward(plan))

    def sample(self, masks: list[GrammarMask]) -> None:
        """See ``Executor.sample``."""
        self._broadcast(Sample(masks))

    def collect(self) -> StepResult:
        """See ``Executor.collect``."""
        self._broadcast(Collect())
        rank, message = self._next_speaker(self._speakers, self._silence_s)
        if rank != 0 or not isinstance(message, Result):
            raise self._dead(rank, message)
        return message.result

    def close(self) -> None:
        """See ``Executor.close``."""
        if self._closed:
            return
        try:
            self._broadcast(Stop())
        except OctavoError:
            self._kill()
        self._release(STOP_S)

    @property
    def _speakers(self) -> list[Speaker]:
        return [*self._crew.workers, *self._nodes]

    def _greetings(self) -> dict[int, Hello]:
        """Every rank's first message, in whatever order they come: a failed start must not wait for its turn."""
        waiting = {rank: "the start" for speaker in self._speakers for rank in speaker.ranks}
        heard = dict.fromkeys(waiting, time.monotonic())
        hellos: dict[int, Hello] = {}
        while waiting:
            left = min(heard[rank] for rank in waiting) + self._silence_s - time.monotonic()
            try:
                rank, message = self._next_speaker(self._speakers, max(0.0, left))
            except EngineDeadError:
                silent = ", ".join(f"rank {rank} since {phase}" for rank, phase in waiting.items())
                raise EngineDeadError(
                    f"The start hangs: nothing was heard for {self._silence_s:g} s ({silent}).",
                    "Look at that rank's messages above, or raise --distributed-timeout-seconds.",
                ) from None
            heard[rank] = time.monotonic()
            if isinstance(message, Progress):
                waiting[rank] = message.phase
                if rank == 0 and self._progress is not None:
                    self._progress(message.phase, message.done, message.total)
            elif isinstance(message, Hello):
                hellos[rank] = message
                waiting.pop(rank, None)
            else:
                raise self._dead(rank, message)
        return hellos

    def _broadcast(self, message: ToWorker) -> None:
        payload = frame(self._encode(message))
        if self._closed:
            raise EngineDeadError("The workers have been stopped.")
        self._crew.ring.write(payload)
        for node in self._nodes:
            node.write(payload)

    def _next_speaker(self, speakers: Sequence[Speaker], wait_s: float) -> tuple[int, FromWorker | None]:
        """The next message; of several, that of the rank that may explain most: the highest, which speaks only to say
        that it failed. Raises where nobody says anything for so long."""
        poll = select.poll()
        for speaker in speakers:
            poll.register(speaker.socket, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(wait_s * 1e3)}
        if not ready:
            self._kill()
            raise EngineDeadError(f"No worker has answered for {wait_s:.0f} s.")
        found = [speaker for speaker in speakers if speaker.socket.fileno() in ready]
        return max(found, key=lambda each: each.ranks[0]).read()

    def _check_others(self) -> None:
        """Raise where a rank other than 0 (which may have a result waiting) has spoken, or rank 0's process is gone."""
        if self._crew.workers[0].process.poll() is not None:
            raise self._dead(0, None)
        poll = select.poll()
        others = self._speakers[1:]
        for speaker in others:
            poll.register(speaker.socket, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(0)}
        for speaker in others:
            if speaker.socket.fileno() in ready:
                raise self._dead(*speaker.read())

    def _check_start(self) -> None:
        """Raise where a worker of this machine has failed while others are waited for."""
        poll = select.poll()
        for worker in self._crew.workers:
            poll.register(worker.socket, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(0)}
        for worker in [each for each in self._crew.workers if each.socket.fileno() in ready]:
            rank, message = worker.read()
            if not isinstance(message, Progress):  # nobody can be ready yet
                raise self._dead(rank, message)

    def _dead(self, rank: int, message: FromWorker | None) -> OctavoError:
        """The error for a rank that failed or vanished; what is left of the others is killed."""
        rank, message = min([(rank, message), *self._last_words(rank)], key=lambda words: _weight(words[1]))
        speaker = next(each for each in self._speakers if rank in each.ranks)
        cause = f"Worker {rank} said {type(message).__name__} out of turn."
        if message is None:
            cause = f"Worker {rank} has ended with status {speaker.status()}."
        self._kill()
        if isinstance(message, Failed):
            error = message.error()
            if not self._started:  # it never started: its own error says it best
                return error
            cause = f"Worker {rank} failed: {error}"
        return EngineDeadError(cause)

    def _last_words(self, rank: int) -> list[tuple[int, FromWorker | None]]:
        """What the other ranks say right after the first failure: that one may be a consequence."""
        words: list[tuple[int, FromWorker | None]] = []
        open_speakers = [speaker for speaker in self._speakers if rank not in speaker.ranks]
        end = time.monotonic() + LAST_WORDS_S
        while open_speakers and time.monotonic() < end:
            poll = select.poll()
            for speaker in open_speakers:
                poll.register(speaker.socket, select.POLLIN)
            ready = {fd for fd, _ in poll.poll((end - time.monotonic()) * 1e3)}
            for speaker in [each for each in open_speakers if each.socket.fileno() in ready]:
                found = speaker.read()
                if found[1] is None or isinstance(found[1], Failed):
                    words.append(found)
                    open_speakers.remove(speaker)
        return words

    def _kill(self) -> None:
        for speaker in self._speakers:
            speaker.kill()

    def _release(self, wait_s: float) -> None:
        self._closed = True
        for node in self._nodes:
            node.stop(wait_s)
        self._crew.close(wait_s)


def _weight(message: FromWorker | None) -> int:
    """How well a message explains why ranks fail together, best first: an error of ours, a process that vanished, and
    errors that others' libraries raised, often because somebody vanished."""
    if isinstance(message, Failed):
        return 0 if message.deliberate else 2
    return 1
