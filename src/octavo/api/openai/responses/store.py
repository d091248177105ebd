"""Responses that clients may come back to: in memory, bounded for each key in number, bytes and age."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from octavo.api.openai.responses.schema import Failure, Response
from octavo.errors import QueueFullError, RequestError


class ResponseNotFoundError(RequestError):
    """No response of that id is kept for this key (HTTP 404)."""

    status = 404
    code = "response_not_found"


@dataclass(frozen=True)
class StoreLimits:
    """Of one key: responses, bytes, and seconds since a response was last written. No responses: nothing is kept."""

    entries: int = 256
    nbytes: int = 64 << 20
    seconds: float = 3600.0
    running: int = 32  # in the background at a time


@dataclass
class Kept:
    """One response. ``turns`` is the conversation up to its end, ``items`` what the request itself brought.

    ``stop`` ends the generation of a response that runs in the background, which is ``task``; where it runs in another
    process, ``cancel_away`` does so and returns what became of it, and ``place`` tells which.
    """

    response: Response
    items: list[dict[str, Any]]
    turns: Sequence[Mapping[str, Any]] = ()
    stop: Callable[[], None] | None = None
    task: asyncio.Task[None] | None = None
    cancel_away: Callable[[], Awaitable[Response]] | None = None
    place: object = None
    nbytes: int = 0
    written_s: float = field(default=0.0)


class ResponseStore:
    """Keeps responses by owner (a key's digest) and id; the oldest go first."""

    def __init__(self, limits: StoreLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock = clock
        self._owners: dict[str, OrderedDict[str, Kept]] = {}

    def get(self, owner: str, response_id: str) -> Kept:
        """The response, or ``ResponseNotFoundError``."""
        self._expire()
        kept = self.peek(owner, response_id)
        if kept is None:
            raise not_kept(response_id, self.limits)
        return kept

    def peek(self, owner: str, response_id: str) -> Kept | None:
        """The response, if it is kept."""
        mine = self._owners.get(owner)
        return None if mine is None else mine.get(response_id)

    def fail_at(self, place: object, failure: Failure) -> None:
        """What runs at ``place`` has no longer anybody to finish it."""
        for mine in self._owners.values():
            for kept in mine.values():
                if kept.place is place and kept.stop is not None:
                    kept.stop = kept.cancel_away = None
                    kept.response.status, kept.response.error = "failed", failure

    def put(self, owner: str, kept: Kept) -> None:
        """Keep a response (again, after it changed); makes room for it."""
        if not self.limits.entries:
            return
        kept.nbytes = len(msgspec.json.encode((kept.response, kept.items, list(kept.turns))))
        kept.written_s = self._clock()
        mine = self._owners.setdefault(owner, OrderedDict())
        before = mine.get(kept.response.id)
        if before is not None and before is not kept and before.stop is not None:
            before.stop()  # the client gave its id to another
        mine[kept.response.id] = kept
        mine.move_to_end(kept.response.id)
        self._expire()
        total = sum(other.nbytes for other in mine.values())
        while mine and (len(mine) > self.limits.entries or total > self.limits.nbytes):
            _, oldest = mine.popitem(last=False)
            total -= oldest.nbytes
            if oldest.stop is not None:
                oldest.stop()
        self._forget_empty(owner)

    def remove(self, owner: str, response_id: str) -> None:
        """Forget a response; one that still runs is ended."""
        mine = self._owners.get(owner)
        kept = None if mine is None else mine.pop(response_id, None)
        self._forget_empty(owner)
        if kept is not None and kept.stop is not None:
            kept.stop()

    def check_running(self, owner: str) -> None:
        """``QueueFullError`` where a key has as many responses in the background as it may."""
        running = sum(kept.stop is not None for kept in self._owners.get(owner, {}).values())
        if running >= self.limits.running:
            raise QueueFullError(f"{running} responses of this key run in the background, as many as may.")

    def __len__(self) -> int:
        return sum(len(mine) for mine in self._owners.values())

    def _expire(self) -> None:
        """Forget what is too old, whoever owns it."""
        limit = self._clock() - self.limits.seconds
        for owner, mine in list(self._owners.items()):
            while mine:
                response_id, oldest = next(iter(mine.items()))
                if oldest.written_s > limit:
                    break
                del mine[response_id]
                if oldest.stop is not None:
                    oldest.stop()
            self._forget_empty(owner)

    def _forget_empty(self, owner: str) -> None:
        if not self._owners.get(owner, True):
            del self._owners[owner]


def not_kept(response_id: str, limits: StoreLimits) -> ResponseNotFoundError:
    """The error for an id that nobody knows, or no longer."""
    return ResponseNotFoundError(
        f"No response {response_id!r} is kept.",
        param="response_id",
        cure=f"Responses are kept for {limits.seconds:g} seconds, at most {limits.entries} a key.",
    )
