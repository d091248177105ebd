"""Starts the engine's process before anything else of a server is imported, so that both get ready side by side."""

from __future__ import annotations

import sys

import msgspec

from octavo.config import EngineOptions
from octavo.device.platform.machine import gpu_in_sight
from octavo.engine.client.channel import Channel

ENGINE = (sys.executable, "-m", "octavo.host")


def start_engine(options: EngineOptions) -> Channel:
    """The process, which imports what such options will probably need, and then waits for the options themselves."""
    return Channel([*ENGINE, likely_backend(options)])


def likely_backend(options: EngineOptions) -> str:
    """The backend by the options alone ("cuda", "torch" on a CPU, or "compiled"); "" where workers will have it. The files
    may overrule it."""
    if options.parallel.uses_workers or options.parallel.is_rank:
        return ""
    device = options.device
    if device.device == "cuda" or (device.device == "auto" and gpu_in_sight()):
        return "cuda"
    return "torch" if device.cpu_backend == "torch" else "compiled"


def encode_options(options: EngineOptions) -> bytes:
    """Options for the engine's process."""
    return msgspec.msgpack.encode(options)


def decode_options(raw: bytes) -> EngineOptions:
    """The reverse of ``encode_options``."""
    return msgspec.msgpack.decode(raw, type=EngineOptions)
