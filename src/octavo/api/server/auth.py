"""Authentication: one ASGI layer in front of every route, no route can forget it."""

from __future__ import annotations

import hashlib

from starlette.types import ASGIApp, Receive, Scope, Send

from octavo.api.caller import ANYBODY
from octavo.api.server.errors import AuthenticationError, dialect_of, error_reply
from octavo.api.server.keys import Caps, KeyRing, token_of

OPEN_PATHS = frozenset({"/health", "/ping"})  # probes of load balancers carry no key


class BearerAuth:
    """Lets a request through if it carries a key of the ring, and notes whose it is for the route (``caller_of``).

    The decision looks at the path that the router will see and at nothing else: a URL rebuilt from the Host header
    can be bent by the client (CVE-2026-48746).
    """

    def __init__(self, app: ASGIApp, ring: KeyRing) -> None:
        self.app = app
        self.ring = ring

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
        if route_path(scope) in OPEN_PATHS:
            scope["octavo.caller"] = ANYBODY, Caps()
            return True
        found = self.ring.find(token_of(scope["headers"]))
        if found is None:
            return False
        scope["octavo.caller"] = found
        return True


def owner_of(scope: Scope) -> str:
    """Whose request this is: a digest of its key ("" without one); what is kept for one is not shown to another."""
    key = token_of(scope["headers"])
    return hashlib.sha256(key).hexdigest() if key else ""


def route_path(scope: Scope) -> str:
    """The path as the router sees it: without the prefix under which a proxy publishes the server."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    return path[len(root) :] if root and path.startswith(root + "/") else path
