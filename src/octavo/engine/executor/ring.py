"""Plans for many workers through shared memory: one writer, N readers, a stream of bytes that goes round.

    head: bytes written │ reader 0: bytes read, asleep?, beats │ reader 1 ... │ data, used as a circle
                          ▲ a line of 64 bytes each, so that no two processes share one

A reader that is up to date looks again and again for a short while, then sleeps on its socket until the writer, who
sees its flag, sends a byte there. The memory has no name: it is inherited, and is gone with the last process.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import tempfile
import threading
import time
from collections.abc import Callable

CAPACITY = 4 << 20
LINE = 64
ASLEEP, BEATS = 1, 2  # words of a reader's line behind the bytes it has read; see pulse.py for the last
SLEEP_MS = 50  # a wake-up cannot be missed; looking again now and then costs nothing
WRITER_NAP_S = 0.0002


def line_of(reader: int) -> int:
    """The first word of a reader's line."""
    return (1 + reader) * LINE // 8


def open_memory(num_readers: int, capacity: int = CAPACITY) -> int:
    """A descriptor of fresh shared memory for a ring."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("octavo-ring")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, LINE * (1 + num_readers) + capacity)
    return fd


class _Ring:
    """What both ends share."""

    def __init__(self, fd: int, num_readers: int) -> None:
        self.map = mmap.mmap(fd, 0)
        self.words = memoryview(self.map).cast("Q")
        self.start = LINE * (1 + num_readers)
        self.capacity = len(self.map) - self.start
        self._lock = threading.Lock()

    def fence(self) -> None:
        """Everything before is seen by others before anything after: a lock is a barrier one way, two are one both ways."""
        with self._lock:
            pass
        with self._lock:
            pass

    def span(self, at: int, size: int) -> tuple[slice, int]:
        """The piece of memory from stream position ``at`` on, as far as the end of the circle, and its length."""
        place = at % self.capacity
        size = min(size, self.capacity - place)
        return slice(self.start + place, self.start + place + size), size

    def close(self) -> None:
        """Unmap."""
        self.words.release()
        self.map.close()


class RingWriter(_Ring):
    """The one end that writes; ``wake(reader)`` is called for readers that sleep, ``check`` while they are too slow."""

    def __init__(
        self, fd: int, num_readers: int, wake: Callable[[int], None], check: Callable[[], None]
    ) -> None:
        super().__init__(fd, num_readers)
        self.num_readers = num_readers
        self.wake = wake
        self.check = check
        self.written = 0

    def write(self, data: bytes) -> None:
        """All of it, waiting for the slowest reader where the circle is full."""
        rest = memoryview(data if self.num_readers else b"")
        while rest:
            slowest = min(self.words[line_of(reader)] for reader in range(self.num_readers))
            free = self.capacity - (self.written - slowest)
            if not free:
                self.check()
                time.sleep(WRITER_NAP_S)
                continue
            where, size = self.span(self.written, min(free, len(rest)))
            self.map[where] = rest[:size]
            self.fence()
            self.written += size
            self.words[0] = self.written
            rest = rest[size:]
            self.fence()
            for reader in range(self.num_readers):
                if self.words[line_of(reader) + ASLEEP]:
                    self.words[line_of(reader) + ASLEEP] = 0
                    self.wake(reader)

    def beats(self, reader: int) -> int:
        """How often a reader's process has shown that it runs."""
        return self.words[line_of(reader) + BEATS]


class RingReader(_Ring):
    """One of the ends that read; has the ``read`` of a binary stream."""

    def __init__(self, fd: int, num_readers: int, index: int, bell: socket.socket, spin_s: float) -> None:
        super().__init__(fd, num_readers)
        self.line = line_of(index)
        self.bell = bell
        self.spin_s = spin_s
        self.done = 0

    def read(self, count: int) -> bytes:
        """Exactly ``count`` bytes; ``EOFError`` where the writer's process is gone."""
        out = bytearray(count)
        got = 0
        while got < count:
            ready = self.words[0] - self.done
            if not ready:
                self._wait()
                continue
            self.fence()
            where, size = self.span(self.done, min(ready, count - got))
            out[got : got + size] = self.map[where]
            self.fence()
            got += size
            self.done += size
            self.words[self.line] = self.done
        return bytes(out)

    def _wait(self) -> None:
        """Until there is more: first by looking, then asleep."""
        end = time.perf_counter() + self.spin_s
        while time.perf_counter() < end:
            if self.words[0] != self.done:
                return
            os.sched_yield()
        poll = select.poll()
        poll.register(self.bell, select.POLLIN)
        while self.words[0] == self.done:
            self.words[self.line + ASLEEP] = 1
            self.fence()
            if self.words[0] != self.done:
                break
            if poll.poll(SLEEP_MS) and not self.bell.recv(4096):
                raise EOFError
        self.words[self.line + ASLEEP] = 0
