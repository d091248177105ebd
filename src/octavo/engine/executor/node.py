"""Ranks of another machine behind one TCP connection.

    machine 0: executor ──frames, as they are──>  machine 1: agent ──ring──> its workers
                        <──answers, each with its rank──           <──sockets──

Machine 0 listens beside the port where ranks meet, and agents dial it. What travels are plans and results of declared
types; nothing in them names code, since an agent builds what its own command line asks for. There is no encryption:
the network between the machines must be private, as it must be for NCCL.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Sequence

import msgspec

from octavo.engine.executor.frames import FromWorker, Stop, ToWorker, Unbuffered, frame, read_frame
from octavo.engine.executor.multiproc import STOP_S, Crew
from octavo.errors import EngineDeadError, UsageError

DIAL_S = 120.0  # how long machines wait for each other
CHUNK_BYTES = 1 << 16


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
    """Machine 0's end; implements ``executor.multiproc.Node``."""

    def __init__(self, connection: socket.socket, hello: NodeHello) -> None:
        self.ranks: Sequence[int] = hello.ranks
        self.socket = connection
        self._stream = Unbuffered(connection)
        self._ended = "unknown: the connection to its machine was lost"
        self._decode = msgspec.msgpack.Decoder(FromWorker).decode

    def read(self) -> tuple[int, FromWorker | None]:
        """See ``Speaker``."""
        try:
            relayed = msgspec.msgpack.decode(read_frame(self._stream), type=Relayed)
        except (EOFError, OSError):
            return self.ranks[0], None
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
    listener: socket.socket, count: int, plan: str, check: Callable[[], None], wait_s: float = DIAL_S
) -> list[TCPNode]:
    """Wait for ``count`` agents that were asked for the same ``plan``; ``check`` raises where waiting is pointless."""
    nodes: dict[int, TCPNode] = {}
    end = time.monotonic() + wait_s
    with listener:
        while len(nodes) < count:
            check()
            if time.monotonic() > end:
                missing = [str(rank) for rank in range(1, count + 1) if rank not in nodes]
                raise EngineDeadError(
                    f"Machine {', '.join(missing)} of {count + 1} did not dial within {wait_s:g} s.",
                    "Start it with the same flags and its own --node-rank; check --master-addr and the firewall.",
                )
            if not select.select([listener], [], [], 0.2)[0]:
                continue
            connection, _ = listener.accept()
            hello = _greeted(connection)
            if hello is None:
                connection.close()
                continue
            if hello.plan != plan or hello.node_rank in nodes or not 0 < hello.node_rank <= count:
                connection.close()
                raise UsageError(
                    f"Machine {hello.node_rank} was started with other flags ({hello.plan}) than machine 0 ({plan}), or twice.",
                    "Give all machines the same flags but for --node-rank.",
                )
            nodes[hello.node_rank] = TCPNode(connection, hello)
    return [nodes[rank] for rank in sorted(nodes)]


def _greeted(connection: socket.socket) -> NodeHello | None:
    """The agent's first words; None where it is no agent of ours."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(frame(msgspec.msgpack.encode(hello)))
    return connection


class Agent:
    """Another machine's end: passes frames on to its workers and their answers back."""

    def __init__(self, connection: socket.socket, crew: Crew) -> None:
        self.connection = connection
        self.crew = crew
        self.crew.ring.check = self._relay_answers
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
                ready = {fd for fd, _ in poll.poll()}
                if ready - {self.connection.fileno()}:
                    self._relay_answers()
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

    def _relay_answers(self) -> None:
        """Pass on what workers have said; raises ``EOFError`` where one of them is gone."""
        poll = select.poll()
        for worker in self.crew.workers:
            poll.register(worker.socket, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(0)}
        for worker in self.crew.workers:
            if worker.socket.fileno() not in ready:
                continue
            rank, message = worker.read()
            payload = b"" if message is None else self._encode(message)
            status = worker.status() if message is None else ""
            self.connection.sendall(frame(self._encode(Relayed(rank, payload, status))))
            if message is None:
                raise EOFError
