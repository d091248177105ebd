"""What the front processes of a server have in common; where there is one process, it is that one's."""

from __future__ import annotations

from typing import Protocol

from octavo.api.openai.responses.keeper import LocalKeeper, ResponseKeeper
from octavo.api.openai.responses.store import ResponseStore, StoreLimits
from octavo.api.server.keys import Caps, KeyEntry, caps_for
from octavo.api.server.metrics import RequestMetrics


class Shared(Protocol):
    """Kept responses, caps of keys, and counts. ``metrics`` are this process's own."""

    metrics: RequestMetrics
    keeper: ResponseKeeper

    def caps(self, entry: KeyEntry) -> Caps:
        """The caps of a key, which hold for all processes together."""

    async def totals(self) -> RequestMetrics:
        """What all processes have counted."""


class Own:
    """Implements ``Shared`` for the first process, or the only one."""

    def __init__(self, limits: StoreLimits) -> None:
        self.metrics = RequestMetrics()
        self.store = ResponseStore(limits)
        self.keeper: ResponseKeeper = LocalKeeper(self.store)
        self._caps: dict[str, Caps] = {}

    def caps(self, entry: KeyEntry) -> Caps:
        """See ``Shared``."""
        return self._caps.setdefault(entry.name, caps_for(entry))

    def caps_of_key(self, name: str) -> Caps:
        """Those of a key that another process has met; without limits where there is no such key."""
        return self._caps.get(name) or Caps()

    async def totals(self) -> RequestMetrics:
        """See ``Shared``."""
        return self.metrics
