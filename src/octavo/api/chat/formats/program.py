"""Reads calls written like a program's, ``f(city="Köln", days=[1, 2])`` or ``call:f{city:<escape>Köln<escape>}``: the
values of Python or of Gemma as JSON. A hand-written tokenizer; nothing is evaluated, names and operators are only text."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import Enum, auto

from octavo.api.chat.formats.bodies import MAX_NAME, joined, quoted_inside
from octavo.api.chat.formats.markers import may_begin, partial_marker

MAX_DEPTH = 64
MAX_WORD = 4096
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_WORD_END = re.compile(r"""[\s,:=()\[\]{}'"<]""")
_LITERALS = {
    "True": "true",
    "False": "false",
    "None": "null",
    "true": "true",
    "false": "false",
    "null": "null",
}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0", "\n": ""}
_HEX = {"x": 2, "u": 4, "U": 8}
_CLOSERS = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Dialect:
    """How calls are written: what stands before the name and around the arguments, and the quotes of texts.

    ``quotes`` are tried in order; those of one character know Python's escapes.
    """

    prefix: str
    opener: str
    assign: str
    quotes: tuple[str, ...]


PYTHON = Dialect("", "(", "=", ('"""', "'''", '"', "'"))


class _At(Enum):
    PREFIX = auto()
    NAME = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    AFTER = auto()  # a value: a comma or the end
    TEXT = auto()
    WORD = auto()


class ProgramReader:
    """One call; see ``BodyReader``. The pieces are JSON as soon as the text they come from is there."""

    def __init__(self, dialect: Dialect) -> None:
        self.name: str | None = None
        self.done = False
        self.broken = False
        self._dialect = dialect
        self._at = _At.PREFIX
        self._pending = ""
        self._word = ""
        self._quote = ""
        self._is_key = False  # the word or text being read is a key
        self._empty = True  # nothing in the innermost container yet
        self._open: list[str] = []  # openers of the containers around
        self._pieces: list[str] = []

    def take(self) -> str:
        """See ``BodyReader.take``."""
        taken = "".join(self._pieces)
        self._pieces.clear()
        return taken

    def feed(self, text: str, at: int) -> int:
        """See ``BodyReader.feed``; stops behind the name too."""
        buffer, place, base = joined(self._pending, text, at)
        self._pending = ""
        while place < len(buffer) and not (self.done or self.broken):
            had_name = self.name is not None
            moved = self._step(buffer, place)
            if moved is None:  # a marker or an escape may be incomplete
                self._pending, place = buffer[place:], len(buffer)
                break
            place = moved
            if not had_name and self.name is not None:
                break
        return base + place

    def _step(self, buffer: str, at: int) -> int | None:
        if self._at is _At.TEXT:
            return self._text(buffer, at)
        if self._at is _At.WORD:
            return self._read_word(buffer, at)
        if self._at is _At.NAME:
            return self._read_name(buffer, at)
        if buffer[at].isspace():
            return at + 1
        if self._at is _At.PREFIX:
            return self._prefix(buffer, at)
        if self._at is _At.COLON:
            return self._colon(buffer, at)
        if self._at is _At.AFTER:
            return self._after(buffer, at)
        return self._item(buffer, at)

    def _fail(self, at: int) -> int:
        self.broken = True
        return at

    def _prefix(self, buffer: str, at: int) -> int | None:
        prefix = self._dialect.prefix
        if buffer.startswith(prefix, at):
            self._at = _At.NAME
            return at + len(prefix)
        return None if may_begin(buffer, at, prefix) else self._fail(at)

    def _read_name(self, buffer: str, at: int) -> int:
        opener = self._dialect.opener
        found = buffer.find(opener, at)
        self._word += buffer[at:] if found < 0 else buffer[at:found]
        name = self._word.strip()
        known = name.replace(".", "_").replace("-", "_")
        if len(self._word) > MAX_NAME or (known and not known.isidentifier()) or (found >= 0 and not known):
            return self._fail(at)
        if found < 0:
            return len(buffer)
        self.name, self._word = name, ""
        self._enter(opener)
        return found + len(opener)

    def _enter(self, opener: str) -> None:
        """A container begins; the arguments themselves are one."""
        self._open.append(opener)
        self._empty = True
        self._pieces.append("[" if self._is_list else "{")
        self._at = _At.VALUE if self._is_list else _At.KEY
        if len(self._open) > MAX_DEPTH:
            self.broken = True

    @property
    def _is_list(self) -> bool:
        return self._open[-1] == "[" or (self._open[-1] == "(" and len(self._open) > 1)

    def _leave(self) -> None:
        self._pieces.append("]" if self._is_list else "}")
        self._open.pop()
        self._empty = False
        self._at = _At.AFTER
        self.done = not self._open

    def _item(self, buffer: str, at: int) -> int | None:
        """At a key or a value."""
        mark = buffer[at]
        if mark == _CLOSERS[self._open[-1]]:
            if self._at is _At.VALUE and not self._is_list:
                return self._fail(at)
            self._leave()
            return at + 1
        self._is_key = self._at is _At.KEY
        quote = next((q for q in self._dialect.quotes if buffer.startswith(q, at)), None)
        longer = any(q != quote and may_begin(buffer, at, q) for q in self._dialect.quotes)
        if longer and len(buffer) - at < max(map(len, self._dialect.quotes)):
            return None  # one quote may be the first of three
        if quote is not None:
            self._separate()
            self._quote, self._at = quote, _At.TEXT
            self._pieces.append('"')
            return at + len(quote)
        if mark in _CLOSERS and not self._is_key:
            self._separate()
            self._enter(mark)
            return at + 1
        if mark in ",:=)]}'\"<":
            return self._fail(at)
        self._separate()
        self._word, self._at = "", _At.WORD
        return at

    def _separate(self) -> None:
        """A comma before every entry but the first."""
        if (self._is_key or self._is_list) and not self._empty:
            self._pieces.append(", ")
        self._empty = False

    def _colon(self, buffer: str, at: int) -> int:
        assign = self._dialect.assign if len(self._open) == 1 else ":"
        if buffer[at] != assign:
            return self._fail(at)
        self._pieces.append(": ")
        self._at = _At.VALUE
        return at + 1

    def _after(self, buffer: str, at: int) -> int:
        mark = buffer[at]
        if mark == ",":
            self._at = _At.VALUE if self._is_list else _At.KEY
            return at + 1
        if mark != _CLOSERS[self._open[-1]]:
            return self._fail(at)
        self._leave()
        return at + 1

    def _read_word(self, buffer: str, at: int) -> int:
        found = _WORD_END.search(buffer, at)
        end = len(buffer) if found is None else found.start()
        self._word += buffer[at:end]
        if len(self._word) > MAX_WORD:
            return self._fail(at)
        if found is not None:
            word, is_json = self._word, self._word in _LITERALS or _NUMBER.fullmatch(self._word)
            made = _LITERALS.get(word, word) if is_json and not self._is_key else None
            self._pieces.append(json.dumps(word, ensure_ascii=False) if made is None else made)
            self._at = _At.COLON if self._is_key else _At.AFTER
        return end

    def _text(self, buffer: str, at: int) -> int | None:
        quote = self._quote
        found = buffer.find(quote, at)
        escape = buffer.find("\\", at) if len(quote) == 1 or quote in ('"""', "'''") else -1
        if escape >= 0 and (found < 0 or escape < found):
            if escape > at:
                self._pieces.append(quoted_inside(buffer[at:escape]))
                return escape
            return self._escape(buffer, at)
        if found < 0:
            keep = partial_marker(buffer, at, quote)
            end = len(buffer) - keep
            self._pieces.append(quoted_inside(buffer[at:end]))
            self._pending = buffer[end:]
            return len(buffer)
        self._pieces.append(quoted_inside(buffer[at:found]) + '"')
        self._at = _At.COLON if self._is_key else _At.AFTER
        return found + len(quote)

    def _escape(self, buffer: str, at: int) -> int | None:
        """A backslash in one of Python's texts."""
        if at + 1 >= len(buffer):
            return None
        mark = buffer[at + 1]
        size = _HEX.get(mark)
        if size is None:
            known = _ESCAPES.get(mark)
            plain = mark if mark in "\\'\"" else f"\\{mark}"  # Python keeps a backslash that means nothing
            self._pieces.append(quoted_inside(plain if known is None else known))
            return at + 2
        digits = buffer[at + 2 : at + 2 + size]
        if not all(digit in "0123456789abcdefABCDEF" for digit in digits):
            self._pieces.append(quoted_inside(f"\\{mark}"))
            return at + 2
        if len(digits) < size:
            return None
        code = int(digits, 16)
        if 0xD800 <= code < 0xE000:  # half of a pair: JSON writes it like Python
            self._pieces.append(f"\\u{code:04x}")
        elif code < 0x110000:
            self._pieces.append(quoted_inside(chr(code)))
        else:
            self.broken = True
        return at + 2 + size
