"""Finds the platform by name; each is imported only when it is tried."""

from __future__ import annotations

from importlib import import_module

from octavo.device.platform.base import Platform
from octavo.errors import UsageError

PLATFORMS = {
    "cuda": "octavo.device.platform.cuda:CUDAPlatform",
    "cpu": "octavo.device.platform.cpu:CPUPlatform",
}


def open_platform(kind: str, *, threads: int | None = None, index: int = 0) -> Platform:
    """The platform for "auto", "cpu" or "cuda", of several devices that of number ``index``; raises ``UsageError`` where
    the device is not there."""
    for name, target in PLATFORMS.items():
        if kind not in ("auto", name):
            continue
        module, _, attribute = target.partition(":")
        platform = getattr(import_module(module), attribute)
        reason: str | None = platform.unavailable()
        if reason is None:
            opened: Platform = platform(threads=threads, index=index)
            return opened
        if kind == name:
            raise UsageError(f"--device {kind}: {reason}", "Use --device cpu, or mend the driver.")
    raise UsageError(f"--device {kind} is not known.", f"Choose one of auto, {', '.join(sorted(PLATFORMS))}.")
