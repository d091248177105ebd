"""The page pool: who holds which page, and in which order unheld pages are given away.

    free      never used, or content worthless          taken first, last in first out
    kept      nobody holds it, its content is indexed   taken next, least recently used first
    held      ref[page] sequences hold it

The pool knows nothing of tokens (``prefix.py``) or of sequences (``table.py``).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

from octavo.engine.cache.watch import PageWatch


class PoolError(RuntimeError):
    """The pool's books do not balance: a bug in the engine, never a user's mistake."""


class Pool:
    """Reference counts over pages 0..num_pages-1.

    ``evicted(page)`` is called when a kept page is given to somebody else, so that the index forgets it. ``watch``
    measures what becomes of pages.
    """

    __slots__ = ("_evicted", "_free", "_indexed", "_kept", "_ref", "num_pages", "watch")

    def __init__(
        self, num_pages: int, evicted: Callable[[int], None], watch: PageWatch | None = None
    ) -> None:
        self.num_pages = num_pages
        self.watch = watch
        self._evicted = evicted
        self._free = list(range(num_pages - 1, -1, -1))  # page 0 is taken first
        # An OrderedDict, not a dict: taking from the front of a dict gets slower with every page taken.
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._ref = [0] * num_pages
        self._indexed = [False] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that ``take`` can give: free and kept."""
        return len(self._free) + len(self._kept)

    def is_held(self, page: int) -> bool:
        """Whether some sequence holds the page."""
        return self._ref[page] > 0

    def take(self, count: int) -> list[int]:
        """Hand out that many pages with one reference each; the caller has asked ``num_free`` before."""
        if count > self.num_free:
            raise PoolError(f"{count} pages asked, {self.num_free} free")
        free, ref = self._free, self._ref
        pages = []
        for _ in range(count):
            if free:
                page = free.pop()
            else:
                page, _ = self._kept.popitem(last=False)
                self._indexed[page] = False
                self._evicted(page)
                if self.watch is not None:
                    self.watch.evicted(page)
            if self.watch is not None:
                self.watch.taken(page)
            ref[page] = 1
            pages.append(page)
        return pages

    def share(self, page: int) -> None:
        """One more holder of an indexed page."""
        if self._ref[page] == 0:
            del self._kept[page]
        self._ref[page] += 1
        if self.watch is not None:
            self.watch.used(page)

    def drop(self, pages: Iterable[int]) -> None:
        """One holder less of each; of pages dropped together the first is given away first."""
        ref = self._ref
        for page in pages:
            ref[page] -= 1
            if ref[page] == 0:
                if self._indexed[page]:
                    self._kept[page] = None
                else:
                    self._free.append(page)
            elif ref[page] < 0:
                raise PoolError(f"page {page} was dropped more often than taken")

    def index(self, page: int) -> None:
        """The page's content is in the index: keep it when nobody holds it any more."""
        self._indexed[page] = True

    def unindex(self, page: int) -> None:
        """The index forgot the page: it is worthless once nobody holds it."""
        self._indexed[page] = False
        if self._ref[page] == 0:
            del self._kept[page]
            self._free.append(page)

    def check(self, held: Iterable[int], indexed: Iterable[int]) -> None:
        """Prove the books: ``held`` are the pages of all sequences (with repeats), ``indexed`` those of the index.

        Raises ``PoolError`` that says which page is wrong.
        """
        counts = Counter(held)
        index = set(indexed)
        free = set(self._free)
        if len(free) != len(self._free):
            raise PoolError("a page is in the free list twice")
        for page in range(self.num_pages):
            if counts[page] != self._ref[page]:
                raise PoolError(f"page {page}: {counts[page]} holders, {self._ref[page]} references")
            if self._indexed[page] != (page in index):
                raise PoolError(f"page {page}: the pool and the index disagree whether it is indexed")
            places = (self._ref[page] > 0) + (page in free) + (page in self._kept)
            if places != 1:
                raise PoolError(f"page {page} is in {places} of held, free, kept")
            if page in self._kept and not self._indexed[page]:
                raise PoolError(f"page {page} is kept but not indexed")
