"""How long cached pages live, lie idle and wait to be used again: measured on a sample of pages."""

from __future__ import annotations

import random
import time
from bisect import bisect_left
from collections.abc import Callable

# Seconds; a counter for each, one for what is longer, and behind them the sum.
AGES = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
    *(10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0),
)


class PageWatch:
    """Told by the pool of what happens to pages; ``sample`` is the share of them that is followed."""

    def __init__(self, sample: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._sample = sample
        self._clock = clock
        self._random = random.Random()
        self._seen: dict[int, tuple[float, float]] = {}  # page: taken at, used last at
        self.lifetimes, self.idles, self.gaps = ([0.0] * (len(AGES) + 2) for _ in range(3))

    def taken(self, page: int) -> None:
        """The page gets new content."""
        self._seen.pop(page, None)
        if self._random.random() < self._sample:
            now = self._clock()
            self._seen[page] = (now, now)

    def used(self, page: int) -> None:
        """One more sequence found the page's content in the cache."""
        if page in self._seen:
            since, last = self._seen[page]
            now = self._clock()
            _count(self.gaps, now - last)
            self._seen[page] = (since, now)

    def evicted(self, page: int) -> None:
        """The content is given up for another."""
        if page in self._seen:
            since, last = self._seen.pop(page)
            now = self._clock()
            _count(self.lifetimes, now - since)
            _count(self.idles, now - last)


def _count(ages: list[float], seconds: float) -> None:
    ages[bisect_left(AGES, seconds)] += 1
    ages[-1] += seconds
