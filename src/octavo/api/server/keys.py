"""API keys: from flags and from a file; what each may do, how much, and with which share of the engine.

A keys file is TOML, one table a key::

    [[key]]
    name = "team-a"                # shown in logs and metrics, the unit of fair scheduling
    sha256 = "9f86d0..."           # of the key (printf %s KEY | sha256sum), or: key = "KEY"
    weight = 2.0                   # share under --scheduling-policy fair (default 1)
    scopes = ["inference"]         # inference, metrics, admin (default: the first two)
    models = ["small"]             # served names it may use (default: all)
    max_concurrent = 8             # requests under way (default: any number)
    requests_per_minute = 60       # (default: any number)
    share_prefix_cache = true      # with the other keys that say so (default false: timing tells them nothing)
"""

from __future__ import annotations

import hashlib
import hmac
import time
import tomllib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from octavo.api.caller import ANYBODY, SCOPES, Caller
from octavo.errors import QueueFullError, UsageError
from octavo.protocol import bounds


class KeyEntry(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One table of the keys file."""

    name: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[\w.-]+$")]
    key: Annotated[str, Meta(min_length=1)] | None = None
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-fA-F]{64}$")] | None = None
    weight: bounds.Weight = 1.0
    scopes: tuple[str, ...] = ("inference", "metrics")
    models: tuple[str, ...] | None = None
    max_concurrent: Annotated[int, Meta(ge=1)] | None = None
    requests_per_minute: Annotated[int, Meta(ge=1)] | None = None
    share_prefix_cache: bool = False

    @property
    def digest(self) -> bytes:
        """SHA-256 of the key."""
        return digest(self.key.encode()) if self.key is not None else bytes.fromhex(self.sha256 or "")


class _File(msgspec.Struct, forbid_unknown_fields=True):
    key: list[KeyEntry]


def digest(key: bytes) -> bytes:
    """What is kept of a key, and compared."""
    return hashlib.sha256(key).digest()


def read_keys(path: str) -> tuple[KeyEntry, ...]:
    """The entries of a keys file; ``UsageError`` names the entry and what is wrong with it."""
    where = f"--api-keys-file {path}"
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{where} cannot be read: {type(error).__name__}.") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where} is not TOML: {error}.") from None
    try:
        entries = msgspec.convert(content, _File).key
    except msgspec.ValidationError as error:
        raise UsageError(
            f"{where}: {error}.", "Every key is a [[key]] table; see docs/operations.md."
        ) from None
    if not entries:  # would silently leave the server open
        raise UsageError(f"{where} holds no key.", "Add a [[key]] table.")
    for entry in entries:
        if (entry.key is None) == (entry.sha256 is None):
            raise UsageError(f"{where}: key {entry.name!r} needs either key or sha256.")
        unknown = sorted(set(entry.scopes) - set(SCOPES))
        if unknown:
            raise UsageError(
                f"{where}: key {entry.name!r} has the unknown scope {unknown[0]!r}.",
                f"Use {', '.join(SCOPES)}.",
            )
    for what in ("name", "digest"):
        values = [getattr(entry, what) for entry in entries]
        twice = next((entry.name for i, entry in enumerate(entries) if values[i] in values[:i]), None)
        if twice is not None:
            raise UsageError(f"{where}: {twice!r} is there twice.", "Names and keys must differ.")
    return tuple(entries)


class Caps:
    """How much one key may ask at a time and a minute."""

    def __init__(
        self,
        max_concurrent: int | None = None,
        requests_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_concurrent = max_concurrent
        self._per_minute = requests_per_minute
        self._clock = clock
        self._num_open = 0
        self._tokens = float(requests_per_minute or 0)  # a bucket that a minute fills
        self._filled_s = clock()

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """One request; ``QueueFullError`` where it is one too many."""
        self.take()
        try:
            yield
        finally:
            self.give()

    def take(self) -> None:
        """A request begins; ``QueueFullError`` where it is one too many."""
        self._check()
        self._num_open += 1

    def give(self) -> None:
        """It is over."""
        self._num_open -= 1

    def _check(self) -> None:
        if self._max_concurrent is not None and self._num_open >= self._max_concurrent:
            raise QueueFullError(f"This key has {self._num_open} requests under way, as many as it may.")
        if self._per_minute is None:
            return
        now, rate = self._clock(), self._per_minute / 60
        self._tokens = min(float(self._per_minute), self._tokens + (now - self._filled_s) * rate)
        self._filled_s = now
        if self._tokens < 1:
            wait_s = (1 - self._tokens) / rate
            raise QueueFullError(
                f"This key may send {self._per_minute} requests a minute.", max(1, int(wait_s + 0.999))
            )
        self._tokens -= 1


def caps_for(entry: KeyEntry) -> Caps:
    """The caps of one key, counted in this process."""
    return Caps(entry.max_concurrent, entry.requests_per_minute)


class KeyRing:
    """All keys of a server. Only digests are kept, and all of them are compared (CVE-2025-59425)."""

    def __init__(
        self,
        keys: Sequence[str] = (),
        entries: Sequence[KeyEntry] = (),
        admin_key: str | None = None,
        caps_of: Callable[[KeyEntry], Caps] | None = None,
    ) -> None:
        caps_of = caps_of or caps_for
        self._entries: list[tuple[bytes, Caller, Caps]] = []
        for key in keys:
            self._entries.append((digest(key.encode()), ANYBODY, Caps()))
        for entry in entries:
            caller = Caller(
                name=entry.name,
                weight=entry.weight,
                scopes=frozenset(entry.scopes),
                models=None if entry.models is None else frozenset(entry.models),
                salt=None if entry.share_prefix_cache else entry.name,
            )
            self._entries.append((entry.digest, caller, caps_of(entry)))
        self.is_open = not self._entries
        if admin_key is not None:
            admin = Caller(name="admin", scopes=frozenset({"metrics", "admin"}))
            self._entries.append((digest(admin_key.encode()), admin, Caps()))
        self._nobody = (ANYBODY, Caps())

    def find(self, token: bytes | None) -> tuple[Caller, Caps] | None:
        """Whose token it is; None for nobody's. Without keys everybody is ``ANYBODY``."""
        if token is not None:
            given = digest(token)
            # Every key is compared, so that the time tells nothing about which one was near.
            found = [entry for entry in self._entries if hmac.compare_digest(given, entry[0])]
            if found:
                return found[0][1], found[0][2]
        return self._nobody if self.is_open else None


def token_of(headers: Sequence[tuple[bytes, bytes]]) -> bytes | None:
    """The one credential of a request: ``Authorization: Bearer KEY`` or ``x-api-key: KEY``; None without exactly one."""
    found: list[bytes] = []
    for name, value in headers:
        if name == b"authorization":
            scheme, _, token = value.partition(b" ")
            found.append(token.strip() if scheme.lower() == b"bearer" else b"")
        elif name == b"x-api-key":
            found.append(value.strip())
    return found[0] if len(found) == 1 and found[0] else None


def caller_of(scope: Any) -> tuple[Caller, Caps]:
    """What the authentication layer left in an ASGI scope."""
    found: tuple[Caller, Caps] = scope["octavo.caller"]
    return found
