"""Markers in text that arrives in pieces: a piece may end in the middle of one."""

from __future__ import annotations


def partial_marker(text: str, start: int, marker: str) -> int:
    """How many characters at the end of ``text`` (not before ``start``) may be the beginning of ``marker``."""
    for size in range(min(len(marker) - 1, len(text) - start), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0


def may_begin(text: str, at: int, marker: str) -> bool:
    """Whether all that is left of ``text`` from ``at`` on is the beginning of ``marker`` (and not all of it)."""
    return len(text) - at < len(marker) and marker.startswith(text[at:])
