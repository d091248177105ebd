"""Who sends a request: what a key allows, and whose share its work is charged to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SCOPES = ("inference", "metrics", "admin")


@dataclass(frozen=True)
class Caller:
    """The owner of a key (or anybody, on a server without keys).

    ``models`` are the served names the key may use (None: all). ``salt`` separates the caller's prefix cache from
    everybody else's: without it, the time to the first token tells one tenant what another has asked
    (CVE-2025-46570). ``traceparent`` and ``request_id`` are what the HTTP request itself says, for traces and logs.
    """

    name: str = ""
    weight: float = 1.0
    scopes: frozenset[str] = frozenset({"inference", "metrics"})
    models: frozenset[str] | None = None
    salt: str | None = None
    route: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    def cache_salt(self, asked: str | None) -> str | None:
        """The salt of a request's prefix cache: the caller's own and what the request asks for."""
        if self.salt is None:
            return asked
        return f"{self.salt}\0{asked or ''}"


ANYBODY = Caller()
