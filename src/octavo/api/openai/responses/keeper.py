"""Where responses are kept, as the routes see it: in this process, or (``api/server/fronts``) in the server's first one."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from octavo.api.openai.responses.schema import Response
from octavo.api.openai.responses.store import Kept, ResponseStore
from octavo.errors import RequestError


class ResponseKeeper(Protocol):
    """Responses by owner and id; errors are ``ResponseStore``'s."""

    async def keep(self, owner: str, kept: Kept) -> None:
        """Keep a response (again, after it changed); who asks for it from now on finds it."""

    async def fetch(self, owner: str, response_id: str) -> Kept:
        """A response that is kept."""

    async def forget(self, owner: str, response_id: str) -> None:
        """Drop it, and end it where it still runs."""

    async def check_running(self, owner: str) -> None:
        """``QueueFullError`` where a key has as many responses in the background as it may."""

    async def cancel(self, owner: str, response_id: str) -> Response:
        """End a background response; one that is over stays as it is."""


class LocalKeeper:
    """Implements ``ResponseKeeper`` over a store of this process."""

    def __init__(self, store: ResponseStore) -> None:
        self.store = store

    async def keep(self, owner: str, kept: Kept) -> None:
        """See ``ResponseKeeper``."""
        self.store.put(owner, kept)

    async def fetch(self, owner: str, response_id: str) -> Kept:
        """See ``ResponseKeeper``."""
        return self.store.get(owner, response_id)

    async def forget(self, owner: str, response_id: str) -> None:
        """See ``ResponseKeeper``."""
        self.store.get(owner, response_id)
        self.store.remove(owner, response_id)

    async def check_running(self, owner: str) -> None:
        """See ``ResponseKeeper``."""
        self.store.check_running(owner)

    async def cancel(self, owner: str, response_id: str) -> Response:
        """See ``ResponseKeeper``."""
        kept = self.store.get(owner, response_id)
        check_background(kept)
        if kept.cancel_away is not None:
            kept.response = await kept.cancel_away()
            kept.stop = kept.cancel_away = None
        elif kept.stop is not None:
            kept.stop()
        return kept.response


def check_background(kept: Kept) -> None:
    """Raise ``RequestError`` for a response that does not run in the background."""
    if not kept.response.background:
        raise RequestError("Only background responses can be cancelled.", param="response_id")


def pack(kept: Kept) -> bytes:
    """A kept response for another process (what runs stays behind)."""
    return msgspec.json.encode((kept.response, kept.items, list(kept.turns)))


def unpack(raw: bytes) -> Kept:
    """The reverse of ``pack``."""
    response, items, turns = msgspec.json.decode(
        raw, type=tuple[Response, list[dict[str, Any]], list[dict[str, Any]]]
    )
    return Kept(response, items, turns)
