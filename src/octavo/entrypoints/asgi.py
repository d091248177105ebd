"""The server as an ASGI application, for those who run applications themselves (Ray Serve, see examples/ray)."""

from __future__ import annotations

from octavo.cli.serving import open_from_flags

__all__ = ["open_from_flags"]
