"""The page table of one sequence: which pages it holds, group by group.

    group, P=4     logical page   0     1     2     3
                   tokens       |0123|4567|89ab|cdef|
    window, w=5    held                 [p7   p2]           first=1, pages=[p7, p2]
                   indexed up to page 1 (page 1 is full, page 2 is not)

What is held is always one contiguous run, because ``live`` is a range whose start never falls.
"""

from __future__ import annotations

from collections.abc import Iterator

from octavo.engine.cache.layout import CacheLayout
from octavo.engine.cache.pool import Pool
from octavo.engine.cache.prefix import HashChain, PrefixIndex
from octavo.engine.cache.spec import KVSpec


class Held:
    """The run of pages a sequence holds in one group; ``next_full`` is the first page not yet offered to the index."""

    __slots__ = ("first", "next_full", "pages", "sheds", "size", "spec")

    def __init__(self, spec: KVSpec) -> None:
        self.spec = spec
        self.size = spec.page_size
        self.sheds = spec.live(1 << 40).start > 0  # full attention never drops a page
        self.first = 0
        self.pages: list[int] = []
        self.next_full = 0

    def missing(self, computed: int, end: int) -> int:
        """How many more pages are needed to compute up to ``end`` tokens when ``computed`` are confirmed.

        That is hull(live(computed), live(end)) minus what is held, by the two facts that ``spec.py`` states.
        """
        have = self.first + len(self.pages) if self.pages else self.spec.live(computed).start
        return -(-end // self.size) - have

    def extend(self, computed: int, end: int, pool: Pool) -> tuple[int, list[int]]:
        """Take the missing pages; returns the logical number of the first one and the pages."""
        count = self.missing(computed, end)
        if not self.pages:
            self.first = self.spec.live(computed).start
        start = self.first + len(self.pages)
        new = pool.take(count) if count > 0 else []
        self.pages += new
        return start, new

    def shed(self, computed: int, pool: Pool) -> None:
        """Drop pages that no token after ``computed`` can see."""
        count = self.spec.live(computed).start - self.first
        if count > 0 and self.pages:
            pool.drop(self.pages[:count])
            del self.pages[:count]
            self.first += count


class PageTable:
    """All groups of one sequence over the one pool."""

    __slots__ = ("groups", "hit", "open")

    def __init__(self, layout: CacheLayout) -> None:
        self.groups = [Held(group.spec) for group in layout.groups]
        # Pages of a cached prefix that was found but is not yet shared (only within one admission).
        self.hit: list[list[int]] = [[] for _ in self.groups]
        self.open = False  # between adopt and release

    def missing(self, computed: int, end: int) -> int:
        """New pages needed over all groups to compute up to ``end``, beyond those held and those just found."""
        total = 0
        for held in self.groups:
            total += max(0, held.missing(computed, end))
        if not self.open:  # nothing is held yet, and live(computed) is exactly what was found
            total -= sum(map(len, self.hit))
        return total

    def adopt(self, computed: int, pool: Pool) -> None:
        """Begin to hold pages: share the found prefix of ``computed`` tokens."""
        self.open = True
        for held, hit in zip(self.groups, self.hit):
            held.first = held.spec.live(computed).start
            held.next_full = computed // held.size
            for page in hit:
                pool.share(page)
            held.pages = list(hit)
        self.hit = [[] for _ in self.groups]

    def extend(self, computed: int, end: int, pool: Pool) -> Iterator[tuple[int, int, list[int]]]:
        """Take what is missing up to ``end``; yields (group, first logical page, pages) where a group got some."""
        for group, held in enumerate(self.groups):
            first, pages = held.extend(computed, end, pool)
            if pages:
                yield group, first, pages

    def lease(self, queued: int) -> int:
        """How many tokens after ``queued`` fit into the pages held, in every group."""
        return min((held.first + len(held.pages)) * held.size for held in self.groups) - queued

    def commit(self, computed: int, pool: Pool, index: PrefixIndex, chain: HashChain | None) -> None:
        """Offer pages that are full now to the index, then drop those behind the live range."""
        for group, held in enumerate(self.groups):
            if chain is not None:
                full = computed // held.size
                for number in range(max(held.next_full, held.first), full):
                    page = held.pages[number - held.first]
                    if index.add(group, chain.upto((number + 1) * held.size), page):
                        pool.index(page)
                held.next_full = full
            if held.sheds:
                held.shed(computed, pool)

    def release(self, pool: Pool) -> None:
        """Give every page back; the end of the sequence first, so that a common beginning is kept longest."""
        self.open = False
        for held in self.groups:
            pool.drop(reversed(held.pages))
            held.pages = []
            held.first = held.next_full = 0

    def pages(self) -> Iterator[int]:
        """All pages held, over all groups."""
        for held in self.groups:
            yield from held.pages
