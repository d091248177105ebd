"""Ranks of another machine behind one TCP connection.

    machine 0: executor ──frames, as they are──>  machine 1: agent ──ring──> its workers
                        <──answers, each with its rank──           <──sockets──

Machine 0 listens beside the port where ranks meet, and agents dial it. What travels are plans and results of declared
types; nothing in them names code, since an agent builds what its own command line asks for. There is no encryption:
the network between the machines must be private, as it must be for NCCL. Every second an agent says that it and its
workers run; a machine that lost its power is noticed by TCP's own probes.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Sequence

import msgspec

from octavo.engine.executor.crew import STOP_S, Crew
from octavo.engine.executor.frames import (
    Alive,
    FromWorker,
    Hello,
    Stop,
    ToWorker,
    Unbuffered,
    frame,
    read_frame,
)
from octavo.engine.executor.pulse import SLICE_S, START_FACTOR, Vigil
from octavo.engine.process import Failed
from octavo.errors import EngineDeadError, UsageError

DIAL_S = 120.0  # how long machines wait for each other
CHUNK_BYTES = 1 << 16
PROBE_S, PROBES = 5, 3  # a connection that has been quiet is probed so often before it counts as lost


class NodeHello(msgspec.Struct, array_like=True):
    """An agent's first words; ``plan`` is what both sides must have been asked for, in text."""

    node_rank: int
    ranks: list[int]
    plan: str


class Relayed(msgspec.Struct, array_like=True):
    """A worker's message, or how it ended where ``payload`` is empty."""

    rank: int
    payload: bytes
    status: str = ""


class TCPNode:
    """Machine 0's end; implements ``executor.crew.Node``. Nothing waits longer than ``limit_s`` for the network."""

    def __init__(self, connection: socket.socket, hello: NodeHello, limit_s: float) -> None:
        self.ranks: Sequence[int] = hello.ranks
        self.socket = connection
        self.heard = 0
        connection.settimeout(limit_s)
        self._stream = Unbuffered(connection)
        self._ended = "unknown: the connection to its machine was lost"
        self._decode = msgspec.msgpack.Decoder(FromWorker).decode

    def read(self) -> tuple[int, FromWorker | None]:
        """See ``Speaker``."""
        try:
            relayed = msgspec.msgpack.decode(read_frame(self._stream), type=Relayed)
        except (EOFError, OSError):
            return self.ranks[0], None
        self.heard += 1
        if relayed.payload:
            return relayed.rank, self._decode(relayed.payload)
        self._ended = relayed.status
        return relayed.rank, None

    def write(self, payload: bytes) -> None:
        """See ``Node``; a machine that is gone is noticed when it is listened to."""
        try:
            self.socket.sendall(payload)
        except OSError:
            return

    def status(self) -> str:
        """See ``Speaker``."""
        return self._ended

    def kill(self) -> None:
        """The agent ends its workers when the connection does."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def stop(self, wait_s: float) -> None:
        """See ``Speaker``."""
        self.socket.settimeout(wait_s)
        try:
            while self.socket.recv(CHUNK_BYTES):
                pass
        except OSError:
            pass
        self.socket.close()


def listen(address: str, port: int) -> socket.socket:
    """Where agents dial; raises ``UsageError`` for an address that cannot be bound."""
    try:
        return socket.create_server((address, port))
    except OSError as error:
        raise UsageError(
            f"{address}:{port} (--master-port and one more) cannot be used: {error.strerror}.",
            "Choose another --master-port, and an address of this machine as --master-addr.",
        ) from None


def accept_nodes(
    listener: socket.socket,
    count: int,
    plan: str,
    check: Callable[[], None],
    *,
    first: int = 1,
    wait_s: float = DIAL_S,
    limit_s: float = DIAL_S,
) -> list[TCPNode]:
    """Wait for ``count`` agents that were asked for the same ``plan``; ``check`` raises where waiting is pointless.

    They number themselves from ``first`` on; for ``limit_s`` see ``TCPNode``.
    """
    nodes: dict[int, TCPNode] = {}
    end = time.monotonic() + wait_s
    with listener:
        while len(nodes) < count:
            check()
            if time.monotonic() > end:
                missing = [str(rank) for rank in range(first, count + first) if rank not in nodes]
                raise EngineDeadError(
                    f"Machine {', '.join(missing)} of {count + first} did not dial within {wait_s:g} s.",
                    "Start it with the same flags and its own --node-rank; check --master-addr and the firewall.",
                )
            if not select.select([listener], [], [], 0.2)[0]:
                continue
            connection, _ = listener.accept()
            hello = _greeted(connection)
            if hello is None:
                connection.close()
                continue
            if hello.plan != plan or hello.node_rank in nodes or not first <= hello.node_rank < count + first:
                connection.close()
                raise UsageError(
                    f"Machine {hello.node_rank} was started with other flags ({hello.plan}) than machine 0 ({plan}), or twice.",
                    "Give all machines the same flags but for --node-rank.",
                )
            nodes[hello.node_rank] = TCPNode(connection, hello, limit_s)
    return [nodes[rank] for rank in sorted(nodes)]


def _greeted(connection: socket.socket) -> NodeHello | None:
    """The agent's first words; None where it is no agent of ours."""
    _tune(connection)
    connection.settimeout(5.0)
    try:
        hello = msgspec.msgpack.decode(read_frame(Unbuffered(connection)), type=NodeHello)
    except (EOFError, OSError, msgspec.DecodeError):
        return None
    connection.settimeout(None)
    return hello


def dial(address: str, port: int, hello: NodeHello, wait_s: float = DIAL_S) -> socket.socket:
    """A connection to machine 0, which may not have started yet; raises ``EngineDeadError`` where it never answers."""
    end = time.monotonic() + wait_s
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=5.0)
            break
        except OSError as error:
            if time.monotonic() > end:
                raise EngineDeadError(
                    f"Machine 0 does not answer at {address}:{port}: {error}.",
                    "Check --master-addr and --master-port, and that it is started.",
                ) from None
            time.sleep(0.2)
    connection.settimeout(None)
    _tune(connection)
    connection.sendall(frame(msgspec.msgpack.encode(hello)))
    return connection


def _tune(connection: socket.socket) -> None:
    """Small messages go at once, and a machine that is gone without a word is noticed."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", PROBE_S), ("TCP_KEEPINTVL", PROBE_S), ("TCP_KEEPCNT", PROBES)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Agent:
    """Another machine's end: passes frames on to its workers and their answers back.

    A worker of its own without a beat for ``step_s`` (see ``MultiprocExecutor``) is told as that worker's failure.
    """

    def __init__(self, connection: socket.socket, crew: Crew, step_s: float) -> None:
        self.connection = connection
        self.crew = crew
        self.crew.ring.check = self._tend
        self._step_s = step_s
        self._vigil = Vigil(START_FACTOR * step_s)
        self._starting = len(crew.workers)
        self._told_s = 0.0
        self._stream = Unbuffered(connection)
        self._decode = msgspec.msgpack.Decoder(ToWorker).decode
        self._encode = msgspec.msgpack.Encoder().encode

    def run(self) -> int:
        """Until machine 0 says stop (0) or is gone, or a worker is (1)."""
        stopped = False
        try:
            while not stopped:
                poll = select.poll()
                poll.register(self.connection, select.POLLIN)
                for worker in self.crew.workers:
                    poll.register(worker.socket, select.POLLIN)
                ready = {fd for fd, _ in poll.poll(SLICE_S * 1e3)}
                if ready != {self.connection.fileno()} or time.monotonic() - self._told_s > SLICE_S:
                    self._tend()
                if self.connection.fileno() in ready:
                    payload = read_frame(self._stream)
                    self.crew.ring.write(frame(payload))
                    stopped = isinstance(self._decode(payload), Stop)
        except (EOFError, OSError):
            return 1
        finally:
            if not stopped:
                for worker in self.crew.workers:
                    worker.kill()
            self.crew.close(STOP_S)
            self.connection.close()
        return 0

    def _tend(self) -> None:
        """Pass on what workers have said, and that they run; raises ``EOFError`` where one of them is gone or hangs."""
        poll = select.poll()
        for worker in self.crew.workers:
            poll.register(worker.socket, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(0)}
        for worker in self.crew.workers:
            if worker.socket.fileno() not in ready:
                continue
            rank, message = worker.read()
            self._tell(rank, message, worker.status() if message is None else "")
            if message is None:
                raise EOFError
            if isinstance(message, Hello):
                self._starting -= 1
                if not self._starting:
                    self._vigil = Vigil(self._step_s)
        if time.monotonic() - self._told_s > SLICE_S:
            self._look()

    def _look(self) -> None:
        """Once a second: do all workers beat?"""
        silent = self._vigil.look(self.crew.beats())
        if silent:
            cause = (
                f"No sign of life for {self._vigil.limit_s:g} s; its process is stopped or its machine hangs."
            )
            cure = "Look at it there; where it is only slow raise --execute-model-timeout-seconds."
            self._tell(silent[0], Failed("EngineDeadError", cause, cure))
            raise EOFError
        self._told_s = time.monotonic()
        poll = select.poll()
        poll.register(self.connection, select.POLLOUT)
        if poll.poll(0):  # where machine 0 does not listen it need not hear that we live
            self._tell(self.crew.workers[0].ranks[0], Alive())

    def _tell(self, rank: int, message: FromWorker | None, status: str = "") -> None:
        payload = b"" if message is None else self._encode(message)
        self.connection.sendall(frame(self._encode(Relayed(rank, payload, status))))
