"""Merges of large vocabularies, kept in the user's cache folder: finding Gemma's half a million takes two seconds.

The file is a SHA-256 of its rest, then pairs of 32-bit token numbers; its name is a digest of all that they follow from.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

LARGE = 65536  # tokens from which on keeping is worth it
CHECK_BYTES = 32
VERSION = b"1"  # of how merges are found

Merges = list[tuple[str, str]]


def kept_merges(
    tokens: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    find: Callable[[], Merges],
    vocabulary: Mapping[str, int],
) -> Merges:
    """What ``find`` returns, from the cache where it has been found before; ``vocabulary`` numbers the tokens."""
    if len(tokens) < LARGE:
        return find()
    path = cache_folder() / f"{digest(tokens, scores, types)}.merges"
    known = _read(path, tokens)
    if known is None:
        known = find()
        numbers = array("i", (vocabulary[part] for pair in known for part in pair))
        _write(path, numbers)
    return known


def cache_folder() -> Path:
    """Where merges are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "octavo" / "tokenizers"


def digest(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> str:
    """Names what merges follow from."""
    found = hashlib.sha256(VERSION)
    texts = [token.encode("utf-8", "surrogatepass") for token in tokens]
    for part in (array("q", map(len, texts)), array("d", scores), array("q", types)):
        found.update(part.tobytes())
    found.update(b"".join(texts))
    return found.hexdigest()[:32]


def _read(path: Path, tokens: Sequence[str]) -> Merges | None:
    """The kept merges; None where there are none, or the file is damaged."""
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    check, content = raw[:CHECK_BYTES], raw[CHECK_BYTES:]
    if hashlib.sha256(content).digest() != check:
        return None
    parts = [tokens[i] for i in np.frombuffer(content, "<i4").tolist()]
    return list(zip(parts[::2], parts[1::2]))


def _write(path: Path, numbers: array[int]) -> None:
    """Keep merges; a cache that cannot be written is none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            content = np.array(numbers, "<i4").tobytes()
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(file.name, path)
    except OSError:
        return
