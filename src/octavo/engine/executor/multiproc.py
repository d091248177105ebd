"""Workers in processes of their own, one a device: every plan goes to all, rank 0 answers.

    engine                      worker 0            worker 1
    forward(plan)   ──Forward──>  runner.forward      runner.forward
    sample(masks)   ──Sample───>  runner.sample       runner.sample
    collect()       ──Collect──>  runner.collect      runner.collect
                    <──Result───

A worker that ends or fails is seen at the next call as the end of its socket, also while another worker waits for
it in vain, and becomes ``EngineDeadError`` (or the worker's own error while it starts).
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import sys
from typing import Any

import msgspec

from octavo.engine.cache.layout import CacheLayout
from octavo.engine.executor.frames import (
    Build,
    Collect,
    Forward,
    FromWorker,
    Hello,
    Result,
    Sample,
    Stop,
    ToWorker,
    frame,
    read_frame,
    unpack_layout,
)
from octavo.engine.process import Failed
from octavo.errors import EngineDeadError, OctavoError
from octavo.protocol.plan import GrammarMask, StepPlan, StepResult

STOP_S = 5.0  # how long a worker may take to stop before it is killed


class Worker:
    """A child process and our end of its socket."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "octavo.engine.executor.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.PIPE,
            )
        self.socket = ours
        self.stream = ours.makefile("rb")
        self._decode = msgspec.msgpack.Decoder(FromWorker).decode

    def read(self) -> Hello | Result | Failed | None:
        """The next message; None where the worker is gone."""
        try:
            payload = read_frame(self.stream)
        except (EOFError, OSError):
            return None
        message: Hello | Result | Failed = self._decode(payload)
        return message

    def stop(self) -> None:
        """Wait for the end, or bring it about."""
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.stream.close()
        self.socket.close()


class MultiprocExecutor:
    """Implements ``Executor`` over worker processes.

    ``factory`` is ``module:function`` of a function ``(arguments, rank, num_workers) -> Runner``; ``arguments`` must be
    JSON. The cache has as many pages as the worker with the fewest.
    """

    def __init__(self, factory: str, arguments: dict[str, Any], *, num_workers: int = 1) -> None:
        self._encode = msgspec.msgpack.Encoder().encode
        self._closed = False
        self._started = False
        self._workers: list[Worker] = []
        try:
            self._workers.extend(Worker(rank) for rank in range(num_workers))
            packed = json.dumps(arguments).encode()
            for worker in self._workers:
                self._send(worker, frame(self._encode(Build(factory, packed, worker.rank, num_workers))))
            hellos = self._greetings()
        except BaseException:
            self._kill()
            raise
        self.layout: CacheLayout = unpack_layout(hellos[0].layout)
        self.num_pages = min(hello.num_pages for hello in hellos)
        self.num_slots = min(hello.num_slots for hello in hellos)
        self._started = True

    @property
    def pids(self) -> list[int]:
        """The workers' process ids, by rank."""
        return [worker.process.pid for worker in self._workers]

    def forward(self, plan: StepPlan) -> None:
        """See ``Executor.forward``."""
        self._broadcast(Forward(plan))

    def sample(self, masks: list[GrammarMask]) -> None:
        """See ``Executor.sample``."""
        self._broadcast(Sample(masks))

    def collect(self) -> StepResult:
        """See ``Executor.collect``."""
        self._broadcast(Collect())
        message = self._answer()
        if not isinstance(message, Result):
            raise EngineDeadError(f"Worker 0 sent {type(message).__name__} instead of a result.")
        return message.result

    def close(self) -> None:
        """See ``Executor.close``."""
        if self._closed:
            return
        self._closed = True
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.socket.settimeout(STOP_S)
                worker.socket.sendall(frame(self._encode(Stop())))
        for worker in self._workers:
            worker.stop()

    def _greetings(self) -> list[Hello]:
        """Every worker's first message, in whatever order they come: a failed start must not wait for its turn."""
        hellos: dict[int, Hello] = {}
        while len(hellos) < len(self._workers):
            worker = self._next_speaker([each for each in self._workers if each.rank not in hellos])
            message = worker.read()
            if not isinstance(message, Hello):
                raise self._dead(worker, message)
            hellos[worker.rank] = message
        return [hellos[worker.rank] for worker in self._workers]

    def _broadcast(self, message: ToWorker) -> None:
        payload = frame(self._encode(message))
        for worker in self._workers:
            self._send(worker, payload)

    def _send(self, worker: Worker, payload: bytes) -> None:
        """Send all of it; while the worker is not reading, look whether some worker has failed."""
        rest = memoryview(payload)
        while rest:
            try:
                rest = rest[worker.socket.send(rest, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                poll = select.poll()
                poll.register(worker.socket, select.POLLOUT)
                if not poll.poll(100):
                    self._check_others()
            except OSError:
                raise self._dead(worker, worker.read()) from None

    def _answer(self) -> FromWorker:
        """Rank 0's next message, unless any other worker speaks: they speak only to say that they failed."""
        speaker = self._next_speaker(self._workers)
        message = speaker.read()
        if speaker.rank != 0 or message is None or isinstance(message, Failed):
            raise self._dead(speaker, message)
        return message

    def _next_speaker(self, workers: list[Worker]) -> Worker:
        """Wait for one that has sent something or is gone; the one that may explain most, the failed, first."""
        poll = select.poll()
        for worker in workers:
            poll.register(worker.socket, select.POLLIN)
        ready = {fd for fd, _ in poll.poll()}
        return max(
            (worker for worker in workers if worker.socket.fileno() in ready), key=lambda each: each.rank
        )

    def _check_others(self) -> None:
        """Raise where a worker other than rank 0 (which may have a result waiting) has spoken."""
        poll = select.poll()
        for worker in self._workers[1:]:
            poll.register(worker.socket, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(0)}
        for worker in self._workers[1:]:
            if worker.socket.fileno() in ready:
                raise self._dead(worker, worker.read())

    def _dead(self, worker: Worker, message: FromWorker | None) -> OctavoError:
        """The error for a worker that failed or vanished."""
        if isinstance(message, Failed):
            error = message.error()
            if not self._started:  # it never started: its own error says it best
                return error
            return EngineDeadError(f"Worker {worker.rank} failed: {error}")
        try:
            status: object = worker.process.wait(1)
        except subprocess.TimeoutExpired:
            status = "unknown"
        return EngineDeadError(f"Worker {worker.rank} has ended with status {status}.")

    def _kill(self) -> None:
        self._closed = True
        for worker in self._workers:
            worker.process.kill()
            worker.stop()
