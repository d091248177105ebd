"""Reads one tool call out of text that arrives in pieces: its name, and its arguments as they come.

Every character is looked at once, nothing is evaluated, and only the call's name (and arguments that come before it) is
held back. The result does not depend on how the text is cut.
"""

from __future__ import annotations

import json
import re
from enum import Enum, auto

_STRUCTURE = re.compile(r'["{}\[\],]')
_IN_STRING = re.compile(r'["\\]')
_SPACE = " \t\r\n"


class _At(Enum):
    START = auto()
    KEY = auto()
    IN_KEY = auto()
    COLON = auto()
    VALUE = auto()
    IN_VALUE = auto()


class CallReader:
    """One JSON object ``{"name": ..., "arguments": ...}``, keys in any order, other keys skipped.

    ``name`` is None until it is known. ``pieces`` are the parts of the arguments' text not taken yet: an object streams,
    a string is unpacked at its end (some models write the arguments as text), null or none at all become ``{}``.
    ``done``: the object is complete. ``broken``: this is not such an object. With ``name`` given only the arguments' value is read.
    """

    def __init__(self, args_keys: tuple[str, ...], name: str | None = None) -> None:
        self.name = name
        self.pieces: list[str] = []
        self.done = False
        self.broken = False
        self._args_keys = args_keys
        self._at = _At.START if name is None else _At.VALUE
        self._alone = name is not None  # a value without the object around it
        self._depth = 0 if name is None else 1
        self._string = False
        self._escaped = False
        self._key = args_keys[0] if name is not None else ""
        self._has_args = False
        self._held: list[str] = []  # the key or value being read, where it is not streamed
        self._streams = False

    def feed(self, text: str, at: int) -> int:
        """Read on from ``at``; returns where reading stopped: the end of ``text``, of the object, what broke it, or
        behind the name (so that what follows an unwanted name is not taken for part of a call)."""
        size, name = len(text), self.name
        while at < size and self.name is name and not (self.done or self.broken):
            if self._string:
                at = self._read_string(text, at)
            elif self._at is _At.IN_VALUE:
                at = self._read_value(text, at)
            elif text[at] in _SPACE:
                at += 1
            else:
                at = self._read_between(text, at)
        return at

    def take(self) -> str:
        """The arguments' text since the last call."""
        taken = "".join(self.pieces)
        self.pieces.clear()
        return taken

    def _keep(self, span: str) -> None:
        (self.pieces if self._streams else self._held).append(span)

    def _read_string(self, text: str, at: int) -> int:
        if self._escaped:
            self._escaped = False
            self._keep(text[at])
            return at + 1
        found = _IN_STRING.search(text, at)
        if found is None:
            self._keep(text[at:])
            return len(text)
        self._keep(text[at : found.end()])
        if found[0] == "\\":
            self._escaped = True
            return found.end()
        self._string = False
        if self._at is _At.IN_KEY:
            self._end_key()
        elif self._depth == 1:
            self._end_value()
        return found.end()

    def _read_value(self, text: str, at: int) -> int:
        """Inside a value, outside of strings."""
        found = _STRUCTURE.search(text, at)
        if found is None:
            self._keep(text[at:])
            return len(text)
        end, mark = found.start(), found[0]
        if self._depth == 1 and mark in ",}]":  # the end of a number, true, false or null
            self._keep(text[at:end])
            self._end_value()
            return end
        self._keep(text[at : end + 1])
        if mark == '"':
            self._string = True
        elif mark in "{[":
            self._depth += 1
        elif mark in "}]":
            self._depth -= 1
            if self._depth == 1:
                self._end_value()
        return end + 1

    def _read_between(self, text: str, at: int) -> int:
        """At a character that is not white space, between keys and values."""
        mark = text[at]
        if self._at is _At.START and mark == "{":
            self._at, self._depth = _At.KEY, 1
        elif self._at is _At.KEY and mark == '"':
            self._at, self._string, self._held = _At.IN_KEY, True, ['"']
        elif self._at is _At.KEY and mark == ",":
            pass
        elif self._at is _At.KEY and mark == "}":
            self.done = True
            if not self._has_args:
                self.pieces.append("{}")
        elif self._at is _At.COLON and mark == ":":
            self._at = _At.VALUE
        elif self._at is _At.VALUE and mark not in ",}]:":
            self._at, self._held = _At.IN_VALUE, []
            self._streams = mark == "{" and self._key in self._args_keys
            self._has_args = self._has_args or self._key in self._args_keys
            return at  # read as part of the value
        else:
            self.broken = True
            return at
        return at + 1

    def _end_key(self) -> None:
        key = _read_json("".join(self._held))
        self._key = key if isinstance(key, str) else ""
        self._at = _At.COLON

    def _end_value(self) -> None:
        raw = "".join(self._held).strip()
        self._at = _At.KEY
        self.done = self._alone
        if self._key == "name" and self.name is None:
            name = _read_json(raw)
            if isinstance(name, str) and name:
                self.name = name
            else:
                self.broken = True
        elif self._key in self._args_keys and not self._streams:
            value = _read_json(raw)
            self.pieces.append("{}" if value is None else value if isinstance(value, str) else raw)
        self._streams = False


def _read_json(raw: str) -> object:
    """The value of a JSON text, None where it is none (or null, or too deep)."""
    try:
        value: object = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value
