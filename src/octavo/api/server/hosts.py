"""Which names a server answers to: keeps web pages out that rebind their own name to this machine (CVE-2024-28224).

A page on evil.example may make that name mean 127.0.0.1 and then talk to a local server as its own origin. The browser still
sends the name in the Host header, so a server on the loopback interface without keys answers to loopback names alone.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from octavo.api.server.errors import ForbiddenError, dialect_of, error_reply


class HostCheck:
    """Answers 403 to a Host header that names none of ``allowed`` (without port, lower case)."""

    def __init__(self, app: ASGIApp, allowed: tuple[str, ...]) -> None:
        self.app = app
        self.allowed = frozenset(name.lower() for name in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self.allows(scope):
            await self.app(scope, receive, send)
            return
        error = ForbiddenError(
            "This server does not answer to that Host.",
            cure="Start it with --allowed-hosts NAME, or with --api-key.",
        )
        await error_reply(error).response(dialect_of(scope["path"]))(scope, receive, send)

    def allows(self, scope: Scope) -> bool:
        """True for exactly one Host header with a known name."""
        given = [value for name, value in scope["headers"] if name == b"host"]
        if len(given) != 1:
            return False
        return host_name(given[0].decode("latin-1")) in self.allowed


def host_name(value: str) -> str:
    """The name in a Host header: without its port, in lower case."""
    name = value.strip().lower()
    if name.startswith("["):
        return name[: name.find("]") + 1]
    return name.partition(":")[0]
