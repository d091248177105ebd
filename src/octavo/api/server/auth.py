"""Authentication: one ASGI layer in front of every route, no route can forget it."""

from __future__ import annotations

import hashlib
import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from octavo.api.server.errors import AuthenticationError, dialect_of, error_reply

OPEN_PATHS = frozenset({"/health", "/ping"})  # probes of load balancers carry no key


class BearerAuth:
    """Lets a request through if it carries one of ``keys`` (see ``presented_key``).

    The decision looks at the path that the router will see and at nothing else: a URL rebuilt from the Host header
    can be bent by the client (CVE-2026-48746). Keys are compared in constant time (CVE-2025-59425).
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self.app = app
        self.keys = tuple(key.encode() for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self.allows(scope):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        error = AuthenticationError(
            "The API key is missing or wrong.", cure="Send the header Authorization: Bearer KEY."
        )
        await error_reply(error).response(dialect_of(route_path(scope)))(scope, receive, send)

    def allows(self, scope: Scope) -> bool:
        """True for an open path or a right key."""
        if not self.keys or route_path(scope) in OPEN_PATHS:
            return True
        token = presented_key(scope)
        if token is None:
            return False
        # Every key is compared, so that the time tells nothing about which one was near.
        matches = [hmac.compare_digest(token, key) for key in self.keys]
        return any(matches)


def presented_key(scope: Scope) -> bytes | None:
    """The key of a request: ``Authorization: Bearer KEY``, or ``x-api-key: KEY`` as Anthropic's clients send it.

    None where there is none, or more than one of either.
    """
    bearers = [value for name, value in scope["headers"] if name == b"authorization"]
    plain = [value for name, value in scope["headers"] if name == b"x-api-key"]
    if len(bearers) > 1 or len(plain) > 1:
        return None
    if bearers:
        scheme, _, token = bearers[0].partition(b" ")
        return token.strip() if scheme.lower() == b"bearer" else None
    return bytes(plain[0]).strip() if plain else None


def owner_of(scope: Scope) -> str:
    """Whose request this is: a digest of its key ("" without one); what is kept for one is not shown to another."""
    key = presented_key(scope)
    return hashlib.sha256(key).hexdigest() if key else ""


def route_path(scope: Scope) -> str:
    """The path as the router sees it: without the prefix under which a proxy publishes the server."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    return path[len(root) :] if root and path.startswith(root + "/") else path
