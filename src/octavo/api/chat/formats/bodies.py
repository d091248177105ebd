"""Reads calls that are not JSON: arguments between tags, and calls written like a program's. Both come out as JSON text.

Like ``CallReader`` every character is looked at a bounded number of times, nothing is evaluated, and the result does not
depend on how the text is cut. What is held back is at most a marker, a name, a key, or a value whose type is not text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Protocol

from octavo.api.chat.formats.markers import may_begin, partial_marker

MAX_NAME = 256
WINDOW = 1024  # characters
Schemas = Mapping[str, Mapping[str, Any] | None]  # of the tools' parameters, by name


class BodyReader(Protocol):
    """Reads one call (see ``CallReader``, the one for JSON)."""

    name: str | None
    done: bool
    broken: bool

    def feed(self, text: str, at: int) -> int:
        """Read on from ``at``; returns where reading stopped."""

    def take(self) -> str:
        """The arguments' JSON text since the last call."""


def joined(pending: str, text: str, at: int) -> tuple[str, int, int]:
    """What is to be read on: a buffer, the place to begin, and where the buffer begins in ``text``.

    Only what was held back makes a copy, and that a short one: what follows is read by the next call.
    """
    if not pending:
        return text, at, 0
    return pending + text[at : at + WINDOW], 0, at - len(pending)


def quoted_inside(text: str) -> str:
    """``text`` as it stands between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


@dataclass(frozen=True)
class Tags:
    """Marks of a tagged call. ``name_ends`` end the name (the last character of a longer text is not eaten by "<");
    ``end`` ends the call, and with ``ends_section`` the section too."""

    name_begin: str
    name_ends: tuple[str, ...]
    key_begin: str
    key_end: str
    value_begin: str
    value_end: str
    end: str
    ends_section: bool = False


class _Stage(Enum):
    BEGIN = auto()
    NAME = auto()
    NEXT = auto()  # a key, or the end
    KEY = auto()
    VALUE_BEGIN = auto()
    VALUE = auto()


class TaggedReader:
    """``<function=f><parameter=a>text</parameter></function>`` and its kin.

    A value whose schema says "string" streams as text; any other is JSON where it can be read as such, else text. One
    newline at each end of a value belongs to the tags where the value has no tag of its own.
    """

    def __init__(self, tags: Tags, schemas: Schemas) -> None:
        self.name: str | None = None
        self.done = False
        self.broken = False
        self._tags = tags
        self._schemas = schemas
        self._name_end = re.compile("|".join(map(re.escape, tags.name_ends)))
        self._trims = not tags.value_begin
        self._stage = _Stage.BEGIN
        self._pending = ""
        self._held: list[str] = []
        self._num_held = 0
        self._pieces: list[str] = []
        self._num_keys = 0
        self._is_text = False
        self._type = ""
        self._at_start = False  # of a value
        self._newline = False  # held back: it may be the tag's own
        self._steps: Mapping[_Stage, Callable[[str, int], int | None]] = {
            _Stage.BEGIN: self._begin,
            _Stage.NAME: self._name,
            _Stage.NEXT: self._next,
            _Stage.KEY: self._key,
            _Stage.VALUE_BEGIN: self._value_begin,
            _Stage.VALUE: self._value,
        }

    def feed(self, text: str, at: int) -> int:
        """See ``BodyReader.feed``; stops behind the name too."""
        buffer, place, base = joined(self._pending, text, at)
        self._pending = ""
        while place < len(buffer) and not (self.done or self.broken):
            had_name = self.name is not None
            moved = self._steps[self._stage](buffer, place)
            if moved is None:  # a marker may be incomplete
                self._pending, place = buffer[place:], len(buffer)
                break
            place = moved
            if not had_name and self.name is not None:
                break
        return base + place

    def take(self) -> str:
        """See ``BodyReader.take``."""
        taken = "".join(self._pieces)
        self._pieces.clear()
        return taken

    def _begin(self, buffer: str, at: int) -> int | None:
        if buffer[at].isspace():
            return at + 1
        mark = self._tags.name_begin
        if buffer.startswith(mark, at):
            self._stage = _Stage.NAME
            return at + len(mark)
        if may_begin(buffer, at, mark):
            return None
        self.broken = True
        return at

    def _name(self, buffer: str, at: int) -> int | None:
        found = self._name_end.search(buffer, at)
        if found is None:
            self._hold(buffer[at:])
            self.broken = self._num_held > MAX_NAME
            return len(buffer)
        self._hold(buffer[at : found.start()])
        name = self._released().strip()
        self.broken = not name or len(name) > MAX_NAME
        if not self.broken:
            self.name = name
            self._stage = _Stage.NEXT
        return found.start() + (0 if found[0] == "<" else len(found[0]))

    def _next(self, buffer: str, at: int) -> int | None:
        tags = self._tags
        if buffer.startswith(tags.key_begin, at):
            self._stage = _Stage.KEY
            return at + len(tags.key_begin)
        if buffer.startswith(tags.end, at):
            self._pieces.append("}" if self._num_keys else "{}")
            self.done = True
            return at + len(tags.end)
        if any(may_begin(buffer, at, mark) for mark in (tags.key_begin, tags.end)):
            return None
        return at + 1  # white space, or something that stands between arguments

    def _key(self, buffer: str, at: int) -> int | None:
        found = self._until(buffer, at, self._tags.key_end)
        if found is None:
            return len(buffer)
        key = self._released().strip()
        self._pieces.append(
            ("{" if not self._num_keys else ", ") + json.dumps(key, ensure_ascii=False) + ": "
        )
        self._num_keys += 1
        self._type = self._type_of(key)
        self._is_text = self._type == "string"
        self._at_start, self._newline = self._trims, False
        self._stage = _Stage.VALUE_BEGIN if self._tags.value_begin else _Stage.VALUE
        if self._is_text:
            self._pieces.append('"')
        return found

    def _value_begin(self, buffer: str, at: int) -> int | None:
        mark = self._tags.value_begin
        if buffer.startswith(mark, at):
            self._stage = _Stage.VALUE
            return at + len(mark)
        return None if may_begin(buffer, at, mark) else at + 1

    def _value(self, buffer: str, at: int) -> int | None:
        end = self._tags.value_end
        found = buffer.find(end, at)
        if found < 0:
            keep = partial_marker(buffer, at, end)
            self._add(buffer[at : len(buffer) - keep])
            self._pending = buffer[len(buffer) - keep :]
            return len(buffer)
        self._add(buffer[at:found])
        self._pieces.append('"' if self._is_text else self._as_json(self._released()))
        self._stage = _Stage.NEXT
        return found + len(end)

    def _add(self, text: str) -> None:
        """More of a value, without the newlines of the tags."""
        if not text:
            return
        if self._at_start:
            self._at_start = False
            text = text.removeprefix("\n")
        if self._newline and text:
            text, self._newline = "\n" + text, False
        if self._trims and text.endswith("\n"):
            text, self._newline = text[:-1], True
        if self._is_text:
            self._pieces.append(quoted_inside(text))
        else:
            self._held.append(text)

    def _type_of(self, key: str) -> str:
        schema = self._schemas.get(self.name or "") or {}
        properties = schema.get("properties")
        known = properties.get(key) if isinstance(properties, Mapping) else None
        kind = known.get("type") if isinstance(known, Mapping) else None
        return kind if isinstance(kind, str) else ""

    def _as_json(self, raw: str) -> str:
        if self._type == "boolean" and raw.strip() in ("True", "False"):
            return raw.strip().lower()
        try:
            return json.dumps(json.loads(raw), ensure_ascii=False)
        except (ValueError, RecursionError):
            return json.dumps(raw, ensure_ascii=False)

    def _until(self, buffer: str, at: int, mark: str) -> int | None:
        """Hold text up to ``mark`` and return what stands behind it; None where it has not come."""
        found = buffer.find(mark, at)
        if found < 0:
            keep = partial_marker(buffer, at, mark)
            self._hold(buffer[at : len(buffer) - keep])
            self._pending = buffer[len(buffer) - keep :]
            return None
        self._hold(buffer[at:found])
        return found + len(mark)

    def _hold(self, text: str) -> None:
        self._held.append(text)
        self._num_held += len(text)

    def _released(self) -> str:
        held, self._held, self._num_held = "".join(self._held), [], 0
        return held
