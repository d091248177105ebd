"""The shared-memory ring: every reader gets every byte, in order, across the circle's end; slow readers hold the writer."""

from __future__ import annotations

import os
import random
import socket
import threading
import time

import pytest

from octavo.engine.executor.frames import frame, read_frame
from octavo.engine.executor.ring import LINE, RingReader, RingWriter, open_memory


class Ends:
    """A writer and its readers in one process."""

    def __init__(self, readers: int, capacity: int, spin_s: float = 0.0) -> None:
        self.memory = open_memory(readers, capacity)
        pairs = [socket.socketpair() for _ in range(readers)]
        self.bells = [ours for ours, _ in pairs]
        self.checks = 0
        self.writer = RingWriter(
            self.memory, readers, lambda index: self.bells[index].sendall(b"\0"), self.check
        )
        self.readers = [
            RingReader(self.memory, readers, index, theirs, spin_s) for index, (_, theirs) in enumerate(pairs)
        ]

    def check(self) -> None:
        self.checks += 1

    def close(self) -> None:
        for reader in self.readers:
            reader.bell.close()
            reader.close()
        for bell in self.bells:
            bell.close()
        self.writer.close()
        os.close(self.memory)


@pytest.mark.parametrize("spin_s", [0.0, 0.001])
def test_every_reader_gets_every_frame(spin_s: float) -> None:
    ends = Ends(3, 1000, spin_s)
    rng = random.Random(1)
    frames = [rng.randbytes(rng.choice([0, 1, 7, 200, 999, 5000])) for _ in range(120)]
    got: list[list[bytes]] = [[] for _ in ends.readers]

    def listen(index: int) -> None:
        for _ in frames:
            if rng.random() < 0.1:
                time.sleep(0.002)
            got[index].append(read_frame(ends.readers[index]))

    threads = [threading.Thread(target=listen, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for payload in frames:
        if rng.random() < 0.1:
            time.sleep(0.002)  # readers fall asleep
        ends.writer.write(frame(payload))
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert got == [frames] * 3
    assert ends.checks, "frames larger than the circle must have made the writer wait"
    ends.close()


def test_a_sleeping_reader_is_woken_at_once() -> None:
    ends = Ends(1, 1000)
    times: list[float] = []

    def listen() -> None:
        for _ in range(20):
            ends.readers[0].read(1)
            times.append(time.perf_counter())

    thread = threading.Thread(target=listen)
    thread.start()
    sent = []
    for _ in range(20):
        while not ends.writer.words[LINE // 8 + 1]:  # until it sleeps
            time.sleep(0.0005)
        sent.append(time.perf_counter())
        ends.writer.write(b"x")
    thread.join(20)
    waits = sorted(after - before for before, after in zip(sent, times, strict=True))
    assert waits[10] < 0.04, "by the bell, not by looking again after 50 ms"
    ends.close()


def test_a_reader_ends_with_its_writer() -> None:
    ends = Ends(1, 1000)
    ends.bells[0].close()
    with pytest.raises(EOFError):
        ends.readers[0].read(1)
    ends.close()


def test_a_check_that_raises_frees_the_writer() -> None:
    ends = Ends(1, 104)

    def dead() -> None:
        raise RuntimeError("the reader is gone")

    ends.writer.check = dead
    ends.writer.write(b"x" * 104)
    with pytest.raises(RuntimeError, match="gone"):
        ends.writer.write(b"x")
    ends.close()


def test_the_memory_has_no_name() -> None:
    ends = Ends(2, 1000)
    assert os.fstat(ends.memory).st_nlink == 0
    ends.close()
