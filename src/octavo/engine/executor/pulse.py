"""Who hangs, and since when.

    a thread in every worker ──beat──> its line in the ring │ seen while the executor waits, and while it idles

A beat needs no more than a process that runs: where it stays away the process is stopped, or its machine gone, whatever
the step may be. Where all beat and a step does not end, ranks wait for each other or their devices hang; that is judged
by how long steps have taken so far.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Mapping

from octavo.engine.executor.ring import BEATS, line_of

BEAT_S = 0.5
SLICE_S = 1.0  # how long those who watch may sleep between two looks
SLACK = 10.0  # times the longest step that could be expected
FADING = 0.98  # a step that was slow once, as the first may be, is forgotten by and by
NEARLY = 0.75
START_FACTOR = 3.0  # libraries that are read from a cold disk stop even the thread that beats


class Pulse:
    """A worker's thread that beats until the process ends."""

    def __init__(self, memory: int, index: int) -> None:
        self._map = mmap.mmap(memory, 0)
        self._words = memoryview(self._map).cast("Q")
        self._at = line_of(index) + BEATS
        threading.Thread(target=self._run, name="octavo-pulse", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._words[self._at] += 1
            time.sleep(BEAT_S)


class Vigil:
    """Counts the time without a beat of every rank; time in which this process itself was stopped does not count."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.waited_s = 0.0
        self._looked = time.monotonic()
        self._last: dict[int, int] = {}
        self._silent: dict[int, float] = {}

    def begin(self) -> None:
        """A new wait: nobody has been silent yet."""
        self.waited_s = 0.0
        self._looked = time.monotonic()
        self._silent.clear()

    def look(self, beats: Mapping[int, int]) -> list[int]:
        """The ranks that have been silent for too long."""
        now = time.monotonic()
        passed = min(now - self._looked, 2 * SLICE_S)
        self._looked = now
        self.waited_s += passed
        for rank, beat in beats.items():
            same = self._last.get(rank) == beat
            self._silent[rank] = self._silent.get(rank, 0.0) + passed if same else 0.0
            self._last[rank] = beat
        if max(self._silent.values(), default=0.0) <= self.limit_s:
            return []
        # Those that stopped together differ by a beat or two.
        return [rank for rank, silent in self._silent.items() if silent > NEARLY * self.limit_s]


class Allowance:
    """How long a step may take: from ``least_s`` to ``most_s``, by the time of those before it."""

    def __init__(self, least_s: float, most_s: float) -> None:
        self.least_s = least_s
        self.most_s = max(least_s, most_s)
        self._slowest_s = 0.0
        self._token_s = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """A step is done."""
        each = seconds / max(1, tokens)
        self._token_s = min(self._token_s, each) if self._slowest_s else each
        self._slowest_s = max(seconds, FADING * self._slowest_s)

    def seconds(self, tokens: int) -> float:
        """For a step of so many tokens; the first may have to compile something, and gets the most."""
        if not self._slowest_s:
            return self.most_s
        expected = max(self._slowest_s, tokens * self._token_s)
        return min(max(self.least_s, SLACK * expected), self.most_s)
