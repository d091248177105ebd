"""What travels between the executor and its workers: MessagePack behind a four-byte length."""

from __future__ import annotations

import socket
from typing import Any, Protocol

import msgspec

from octavo.engine.cache.layout import CacheGroup, CacheLayout
from octavo.engine.cache.spec import ChunkedKV, CompressedKV, FullKV, KVSpec, StateKV, WindowKV
from octavo.engine.process import Failed
from octavo.protocol.plan import GrammarMask, StepPlan, StepResult

MAX_FRAME_BYTES = 1 << 30
KINDS: tuple[type[KVSpec], ...] = (FullKV, WindowKV, ChunkedKV, StateKV, CompressedKV)


class Readable(Protocol):
    """A stream of bytes, blocking."""

    def read(self, count: int, /) -> bytes:
        """``count`` bytes, fewer at the end."""


class Unbuffered:
    """A socket as a stream that takes no more than asked, so that the socket itself tells whether there is more."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def read(self, count: int, /) -> bytes:
        """See ``Readable``."""
        found = self.connection.recv(count, socket.MSG_WAITALL)
        while found and len(found) < count:  # cut short by a signal
            more = self.connection.recv(count - len(found), socket.MSG_WAITALL)
            if not more:
                break
            found += more
        return found


class PackedGroup(msgspec.Struct, array_like=True):
    """A ``CacheGroup`` as plain values."""

    kind: str
    fields: dict[str, int]
    layers: list[int]
    parts: list[int]


class PackedLayout(msgspec.Struct, array_like=True):
    """A ``CacheLayout`` as plain values."""

    groups: list[PackedGroup]
    page_bytes: int
    layers_per_group: int


class Build(msgspec.Struct, tag="build"):
    """First frame: which runner. ``arguments`` is a JSON object.

    ``rank`` of ``num_ranks`` in all; ``index`` of ``num_workers`` is the worker's place in the ring, ``local_index`` of
    ``num_local`` its place on its machine.
    """

    factory: str
    arguments: bytes
    rank: int
    num_ranks: int
    index: int
    num_workers: int
    spin_s: float
    local_index: int
    num_local: int


class Forward(msgspec.Struct, tag="forward"):
    """See ``Runner.forward``."""

    plan: StepPlan


class Sample(msgspec.Struct, tag="sample"):
    """See ``Runner.sample``."""

    masks: list[GrammarMask]


class Collect(msgspec.Struct, tag="collect"):
    """See ``Runner.collect``; only rank 0 answers."""


class Stop(msgspec.Struct, tag="stop"):
    """End the process."""


ToWorker = Build | Forward | Sample | Collect | Stop


class Hello(msgspec.Struct, tag="hello"):
    """The runner is built; ``facts`` is what its factory has to tell besides."""

    layout: PackedLayout
    num_pages: int
    num_slots: int
    facts: bytes = b""


class Progress(msgspec.Struct, tag="progress"):
    """The start goes on: ``done`` of ``total`` units of a phase."""

    phase: str
    done: int
    total: int


class Result(msgspec.Struct, tag="result"):
    """The answer to ``Collect``."""

    result: StepResult


class Alive(msgspec.Struct, tag="alive"):
    """Another machine's agent and all its workers run."""


FromWorker = Hello | Progress | Result | Failed | Alive


def frame(payload: bytes) -> bytes:
    """A payload behind its length."""
    return len(payload).to_bytes(4, "little") + payload


def read_frame(stream: Readable) -> bytes:
    """The next payload; ``EOFError`` where the other end is gone."""
    header = stream.read(4)
    if len(header) < 4:
        raise EOFError
    size = int.from_bytes(header, "little")
    if size > MAX_FRAME_BYTES:
        raise EOFError
    payload = stream.read(size)
    if len(payload) < size:
        raise EOFError
    return payload


def pack_layout(layout: CacheLayout) -> PackedLayout:
    """Plain values of a layout."""
    groups = [
        PackedGroup(group.spec.kind, msgspec.to_builtins(group.spec), list(group.layers), list(group.parts))
        for group in layout.groups
    ]
    return PackedLayout(groups, layout.page_bytes, layout.layers_per_group)


def unpack_layout(packed: PackedLayout) -> CacheLayout:
    """The layout from its plain values."""
    classes: dict[str, Any] = {kind.kind: kind for kind in KINDS}
    groups = tuple(
        CacheGroup(classes[group.kind](**group.fields), tuple(group.layers), tuple(group.parts))
        for group in packed.groups
    )
    return CacheLayout(groups, packed.page_bytes, packed.layers_per_group)
