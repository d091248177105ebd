"""One question per cache kind: which logical pages must be resident to go on after n computed tokens?

A logical page k of a sequence covers the tokens [k*P, (k+1)*P).

    FullKV (P=4), n=10       pages 0 1 2          |0123|4567|89..|
    WindowKV (w=5), n=10     pages   1 2          |    |4567|89..|   the next token sees positions 6..10
    ChunkedKV (c=8), n=10    pages     2          |    |    |89..|   attention never leaves the current chunk
    StateKV (P=8), n=10      page    1            |        |89......|  one page holds the whole state
    CompressedKV (P=8), n=10 pages 0 1            |01234567|89......|  an entry for every ``rate`` tokens: 0-3, 4-7

Everything else is derived: pages for a step from n to m = hull(live(n), live(m)) minus those held; pages to free
after it = held minus live(m); a cached prefix of length n is a hit when every page of live(n), in every group,
is in the index.

Two facts hold for every kind and everything else relies on them: ``live(n).stop`` is ceil(n / P) and
``live(n).start`` never falls as n grows. An empty range keeps its place: ``live(8)`` of the ChunkedKV above is
``range(2, 2)``, so the hull with a later range still covers the tokens in between, which the step must store.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import ClassVar, TypeAlias


def ceil_div(a: int, b: int) -> int:
    """Smallest integer >= a / b."""
    return -(-a // b)


def hull(a: range, b: range) -> range:
    """Smallest range that covers both; an empty range counts with its place (see above)."""
    return range(min(a.start, b.start), max(a.stop, b.stop))


@dataclass(frozen=True)
class FullKV:
    """Keys and values of every token (also used for MLA latents: other bytes, same rule).

    ``page_size`` in tokens, ``token_bytes`` for one layer (keys and values together).
    """

    page_size: int
    token_bytes: int
    kind: ClassVar[str] = "full"

    def live(self, n: int) -> range:
        """Pages needed after n computed tokens: all."""
        return range(ceil_div(n, self.page_size))

    def peak(self, n: int, step: int) -> int:
        """Most pages of hull(live(m - step), live(m)) over all m <= n."""
        return ceil_div(n, self.page_size)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one layer."""
        return self.page_size * self.token_bytes


@dataclass(frozen=True)
class WindowKV:
    """Sliding window: a token sees itself and the ``window - 1`` tokens before it."""

    page_size: int
    token_bytes: int
    window: int
    kind: ClassVar[str] = "window"

    def live(self, n: int) -> range:
        """Pages needed after n computed tokens: those the next token (position n) can see."""
        return range(max(0, n - self.window + 1) // self.page_size, ceil_div(n, self.page_size))

    def peak(self, n: int, step: int) -> int:
        """Most pages of hull(live(m - step), live(m)) over all m <= n."""
        return min(ceil_div(n, self.page_size), 1 + ceil_div(self.window + step - 2, self.page_size))

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one layer."""
        return self.page_size * self.token_bytes


@dataclass(frozen=True)
class ChunkedKV:
    """Chunked-local attention: a token sees only tokens of its own chunk of ``chunk`` tokens."""

    page_size: int
    token_bytes: int
    chunk: int
    kind: ClassVar[str] = "chunked"

    def live(self, n: int) -> range:
        """Pages needed after n computed tokens: the current chunk's (none at a chunk boundary)."""
        return range(n // self.chunk * self.chunk // self.page_size, ceil_div(n, self.page_size))

    def peak(self, n: int, step: int) -> int:
        """Most pages of hull(live(m - step), live(m)) over all m <= n."""
        # Worst case: the chunk starts as late in a page as it can, and the step ends one chunk (and more) later.
        offset = self.page_size - gcd(self.chunk, self.page_size)
        return min(ceil_div(n, self.page_size), ceil_div(offset + self.chunk - 1 + step, self.page_size))

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one layer."""
        return self.page_size * self.token_bytes


@dataclass(frozen=True)
class StateKV:
    """Recurrent state: one page holds the state after the last computed token; a page boundary is a checkpoint."""

    page_size: int
    state_bytes: int
    kind: ClassVar[str] = "state"

    def live(self, n: int) -> range:
        """The single page that holds the state after n tokens (none for n = 0)."""
        last = ceil_div(n, self.page_size)
        return range(max(0, last - 1), last)

    def peak(self, n: int, step: int) -> int:
        """Most pages of hull(live(m - step), live(m)) over all m <= n."""
        return min(ceil_div(n, self.page_size), 1 + ceil_div(step, self.page_size))

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one layer: the state, whatever the page size in tokens."""
        return self.state_bytes


@dataclass(frozen=True)
class CompressedKV:
    """One entry of ``entry_bytes`` for every ``rate`` tokens, kept for good; ``page_size`` is a multiple of ``rate``.

    An entry is written by the step that computes the last of its tokens.
    """

    page_size: int
    entry_bytes: int
    rate: int
    kind: ClassVar[str] = "compressed"

    def live(self, n: int) -> range:
        """Pages needed after n computed tokens: all."""
        return range(ceil_div(n, self.page_size))

    def peak(self, n: int, step: int) -> int:
        """Most pages of hull(live(m - step), live(m)) over all m <= n."""
        return ceil_div(n, self.page_size)

    @property
    def token_bytes(self) -> int:
        """What a token adds, rounded up."""
        return ceil_div(self.entry_bytes, self.rate)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one layer."""
        return self.page_size // self.rate * self.entry_bytes


KVSpec: TypeAlias = FullKV | WindowKV | ChunkedKV | StateKV | CompressedKV
LayerKV: TypeAlias = KVSpec | tuple[KVSpec, ...]  # what one layer keeps: one kind of cache, or several


def kinds_of(kept: LayerKV) -> tuple[KVSpec, ...]:
    """The kinds that a layer keeps, in its own order."""
    return kept if isinstance(kept, tuple) else (kept,)


def label(spec: KVSpec) -> str:
    """A cache kind for people: its name, and how far it looks or how many tokens an entry stands for."""
    size = getattr(spec, "window", 0) or getattr(spec, "chunk", 0) or getattr(spec, "rate", 0)
    return f"{spec.kind} {size}" if size else spec.kind


def with_page_size(spec: KVSpec, page_size: int) -> KVSpec:
    """The same cache kind with another page size in tokens."""
    return replace(spec, page_size=page_size)
