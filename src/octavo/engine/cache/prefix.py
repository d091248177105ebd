"""What pages contain: an index from hashed token prefixes to pages, and the search for the longest hit.

    tokens     |t0..t3|t4..t7|t8..t11|          page size 4
    chain       h0     h1     h2                h[j] = H(h[j-1] + tokens of block j), h[-1] = H(salt)
    index       group 0: h0 -> page 7, h1 -> page 2 ...    group 1: h1 -> page 9 ...

A page of a group with a larger page size has the hash of its last block, so one chain serves every group. H is
blake2b keyed with a random root: nobody outside can build two prompts that collide, and a salt keeps tenants
apart (a hit is a timing side channel).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from math import gcd, lcm

from octavo.engine.cache.layout import CacheLayout
from octavo.engine.cache.spec import KVSpec

DIGEST_BYTES = 16


class HashChain:
    """The block hashes of one sequence, computed as far as somebody asks."""

    __slots__ = ("_block", "_hashes", "_key", "_last", "_tokens")

    def __init__(self, tokens: list[int], block: int, key: bytes, salt: str | None) -> None:
        """``tokens`` may grow later (the list is read, never copied)."""
        self._tokens = tokens
        self._block = block
        self._key = key
        self._hashes: list[bytes] = []
        self._last = hashlib.blake2b((salt or "").encode(), key=key, digest_size=DIGEST_BYTES).digest()

    def upto(self, num_tokens: int) -> bytes:
        """The hash of the first ``num_tokens`` tokens, a multiple of the block size and at least one block."""
        index = num_tokens // self._block - 1
        hashes = self._hashes
        while len(hashes) <= index:
            first = len(hashes) * self._block
            content = array("q", self._tokens[first : first + self._block]).tobytes()
            self._last = hashlib.blake2b(
                self._last + content, key=self._key, digest_size=DIGEST_BYTES
            ).digest()
            hashes.append(self._last)
        return hashes[index]


class PrefixIndex:
    """Hash -> page for every group, and back."""

    def __init__(self, layout: CacheLayout, root_key: bytes) -> None:
        """``root_key`` is 16..64 random bytes; two engines share hashes only with the same key."""
        self.specs = [group.spec for group in layout.groups]
        sizes = [spec.page_size for spec in self.specs]
        self.block = gcd(*sizes) if sizes else 1
        self.align = lcm(*sizes) if sizes else 1
        self._root_key = root_key
        self._pages: list[dict[bytes, int]] = [{} for _ in self.specs]
        self._keys: dict[int, tuple[int, bytes]] = {}

    def chain(self, tokens: list[int], salt: str | None) -> HashChain:
        """A hash chain over a sequence's tokens."""
        return HashChain(tokens, self.block, self._root_key, salt)

    def add(self, group: int, digest: bytes, page: int) -> bool:
        """Enter a full page; False where another page with this content is already there."""
        pages = self._pages[group]
        if digest in pages:
            return False
        pages[digest] = page
        self._keys[page] = (group, digest)
        return True

    def forget(self, page: int) -> None:
        """Take a page out (it must be in)."""
        group, digest = self._keys.pop(page)
        del self._pages[group][digest]

    def holds(self, page: int) -> bool:
        """Whether the page is in the index."""
        return page in self._keys

    def pages(self) -> Iterator[int]:
        """All indexed pages."""
        return iter(list(self._keys))

    def longest(self, chain: HashChain, limit: int) -> tuple[int, list[list[int]]]:
        """Longest prefix of at most ``limit`` tokens whose live pages are all here.

        Returns its length and, per group, the pages of ``live(length)`` in order.
        """

        def page_of(group: int, number: int) -> int | None:
            return self._pages[group].get(chain.upto((number + 1) * self.specs[group].page_size))

        length = longest_hit(self.specs, self.align, limit, lambda g, k: page_of(g, k) is not None)
        found = []
        for group, spec in enumerate(self.specs):
            pages = [page_of(group, number) for number in spec.live(length)]
            found.append([page for page in pages if page is not None])
        return length, found


def longest_hit(specs: Sequence[KVSpec], align: int, limit: int, has: Callable[[int, int], bool]) -> int:
    """Largest multiple n of ``align`` up to ``limit`` such that ``has(group, page)`` for every page of live(n).

    Generic over cache kinds: where page k of a group with page size P is missing, no n in (k * P, n] can be a hit,
    because live(n).start never falls as n grows; so the search jumps to k * P.
    """
    n = limit // align * align
    while n > 0:
        missing = _first_missing(specs, n, has)
        if missing is None:
            return n
        n = missing // align * align
    return 0


def _first_missing(specs: Sequence[KVSpec], n: int, has: Callable[[int, int], bool]) -> int | None:
    """Start (in tokens) of the first missing page found, or None."""
    for group, spec in enumerate(specs):
        for number in spec.live(n):
            if not has(group, number):
                return number * spec.page_size
    return None
