"""Finds tool calls in an answer while it arrives.

    text  <tool_call> {"name": "f", "arguments": {...}} </tool_call>  text
    OUT   GAP         CALL                              GAP           OUT

White space around calls belongs to nobody and is dropped. What looks like a call and is none stays text.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum, auto

from octavo.api.chat.events import ChatEvent, Text, ToolArgs, ToolStart
from octavo.api.chat.formats.bodies import BodyReader, Schemas, TaggedReader, Tags
from octavo.api.chat.formats.calls import CallReader
from octavo.api.chat.formats.markers import may_begin, partial_marker
from octavo.api.chat.formats.program import PYTHON, Dialect, ProgramReader

MAX_NAME = 256


@dataclass(frozen=True)
class ToolSyntax:
    """How a family writes calls.

    ``begin`` opens a section of calls, ``end`` closes it ("" = it lasts to the end of the answer). ``args_key`` is what
    the model was trained to write. ``bare``: an answer that begins with this character is a call too. ``is_list``: the
    section is a JSON list. ``args_mark``: calls are a name, this mark, arguments; ``call_begin``, ``name_before`` and
    ``name_mark`` may stand before the name, ``args_end`` and ``call_end`` behind the arguments; ``numbered`` names end with ":0", ":1" and so on.
    ``tags`` or ``program``: calls are not JSON. ``id_length`` is that of call ids (0: any).
    """

    name: str
    begin: str
    end: str = ""
    args_key: str = "arguments"
    bare: str = ""
    is_list: bool = False
    args_mark: str = ""
    separator: str = "\n"
    id_length: int = 0
    call_begin: str = ""
    name_before: str = ""
    name_mark: str = ""
    args_end: str = ""
    call_end: str = ""
    numbered: bool = False
    tags: Tags | None = None
    program: Dialect | None = None

    @property
    def is_json(self) -> bool:
        """Whether arguments are JSON, so that a grammar can enforce a schema in them."""
        return self.tags is None and self.program is None

    @property
    def again(self) -> str:
        """What begins another call in a section ("": only a look at every character can tell)."""
        if self.program is not None:
            return self.program.prefix
        return self.tags.name_begin if self.tags is not None else self.call_begin or "{"


def new_call_id(syntax: ToolSyntax) -> str:
    """A random id for a call, in the form the family's template accepts."""
    random = uuid.uuid4().hex
    return random[: syntax.id_length] if syntax.id_length else f"call_{random[:24]}"


class _State(Enum):
    OUT = auto()  # text
    GAP = auto()  # in a section, between calls
    NAME = auto()  # a name in front of ``args_mark``
    CALL = auto()  # in a call


class ToolParser:
    """Text of choice ``index`` in, ``Text``, ``ToolStart`` and ``ToolArgs`` out.

    ``names`` are the tools that exist; only a bare call must be one of them. ``schemas`` are those of their parameters. Without ``parallel`` calls behind the first
    are dropped. ``num_calls`` counts those that were told.
    """

    def __init__(
        self,
        syntax: ToolSyntax,
        index: int,
        *,
        names: Collection[str] = (),
        schemas: Schemas | None = None,
        parallel: bool = True,
        new_id: Callable[[ToolSyntax], str] = new_call_id,
    ) -> None:
        self.num_calls = 0
        self._syntax = syntax
        self._index = index
        self._names = frozenset(names)
        self._schemas: Schemas = schemas or {}
        self._parallel = parallel
        self._new_id = new_id
        self._state = _State.OUT
        self._pending = ""  # the beginning of a marker, perhaps
        self._space: list[str] = []  # white space that may turn out to stand before a call
        self._raw: list[str] = []  # the section so far, while it may turn out to be text
        self._reader: BodyReader | None = None
        self._is_bare = False
        self._begun = False  # some text has been told
        self._after_call = False  # white space here stands behind a call
        self._told = False  # the current call has been told
        self._events: list[ChatEvent] = []

    def push(self, text: str) -> list[ChatEvent]:
        """The events that ``text`` brings."""
        buffer, self._pending = self._pending + text, ""
        at = 0
        while at < len(buffer):
            if self._state is _State.OUT:
                at = self._outside(buffer, at)
            elif self._state is _State.GAP:
                at = self._gap(buffer, at)
            elif self._state is _State.NAME:
                at = self._name(buffer, at)
            else:
                at = self._call(buffer, at)
        return self._taken()

    def finish(self) -> list[ChatEvent]:
        """The events at the end of the answer."""
        rest, self._pending = self._pending, ""
        if self._state is _State.OUT:
            self._text(rest)
        elif self._raw:
            self._give_up(rest)
        if not self.num_calls and self._space:
            self._events.append(Text(self._index, "".join(self._space), []))
        self._space = []
        return self._taken()

    def _taken(self) -> list[ChatEvent]:
        taken, self._events = self._events, []
        return taken

    def _text(self, text: str) -> None:
        """Tell text, but for the white space at its end (and behind a call)."""
        if self._after_call:
            text = text.lstrip()
        solid = text.rstrip()
        if solid:
            space, self._space = "".join(self._space), []
            self._begun, self._after_call = True, False
            self._events.append(Text(self._index, space + solid, []))
        if len(solid) < len(text):
            self._space.append(text[len(solid) :])

    def _outside(self, buffer: str, at: int) -> int:
        syntax = self._syntax
        if syntax.bare and not self._begun and not self.num_calls:
            while at < len(buffer) and buffer[at].isspace():
                self._space.append(buffer[at])
                at += 1
            if at < len(buffer) and buffer[at] == syntax.bare:
                self._is_bare = True
                self._open("")
                return at
        found = buffer.find(syntax.begin, at)
        if found >= 0:
            self._text(buffer[at:found])
            self._is_bare = False
            self._open(syntax.begin)
            return found + len(syntax.begin)
        keep = partial_marker(buffer, at, syntax.begin)
        self._text(buffer[at : len(buffer) - keep])
        self._pending = buffer[len(buffer) - keep :]
        return len(buffer)

    def _open(self, marker: str) -> None:
        """A section begins."""
        self._state, self._raw, self._told = _State.GAP, [marker], False

    def _gap(self, buffer: str, at: int) -> int:
        """Between calls: skip separators, find the next call or the end of the section."""
        syntax, mark = self._syntax, buffer[at]
        if self._told and syntax.end and syntax.again and not self._is_bare:
            return self._to_end(buffer, at)
        if not syntax.again or self._is_bare:  # the section's end stands among calls
            if self._told and mark == "]":
                self._state, self._raw = _State.OUT if self._is_bare else _State.GAP, []
                return at + 1
            if syntax.end and buffer.startswith(syntax.end, at):
                return self._close(buffer, at + len(syntax.end))
            if syntax.end and may_begin(buffer, at, syntax.end):
                self._pending = buffer[at:]
                return len(buffer)
        if syntax.is_json and mark == "{":
            self._reader = CallReader(("arguments", "parameters"))
            self._state, self._told = _State.CALL, False
            return at
        if buffer.startswith(syntax.begin, at):  # some models write it before every call
            self._raw_add(syntax.begin)
            return at + len(syntax.begin)
        if may_begin(buffer, at, syntax.begin):
            self._pending = buffer[at:]
            return len(buffer)
        if mark.isspace() or mark in ",;[]":
            self._raw_add(mark)
            return at + 1
        if syntax.args_mark and not self._is_bare:
            self._state = _State.NAME
            return at
        if not syntax.is_json:
            self._reader = self._body()
            self._state, self._told = _State.CALL, False
            return at
        self._give_up("")
        return at

    def _body(self) -> BodyReader:
        """A reader of one call that is not JSON."""
        if self._syntax.tags is not None:
            return TaggedReader(self._syntax.tags, self._schemas)
        return ProgramReader(self._syntax.program or PYTHON)

    def _close(self, buffer: str, at: int) -> int:
        """A section that ends without (or behind) calls."""
        if not self._told and self._raw and not self.num_calls:
            self._give_up(self._syntax.end)
        else:
            self._state, self._raw = _State.OUT, []
        return at

    def _to_end(self, buffer: str, at: int) -> int:
        """Behind a call: drop everything up to the section's end or another call."""
        end, again = self._syntax.end, self._syntax.again
        following = buffer.find(again, at)
        found = buffer.find(end, at, len(buffer) if following < 0 else following)
        if found >= 0:
            self._state, self._raw = _State.OUT, []
            return found + len(end)
        if following >= 0:
            self._told = False
            return following
        keep = max(partial_marker(buffer, at, end), partial_marker(buffer, at, again))
        self._pending = buffer[len(buffer) - keep :]
        return len(buffer)

    def _raw_add(self, span: str) -> None:
        if not self._told:
            self._raw.append(span)

    def _name(self, buffer: str, at: int) -> int:
        """A name up to the mark that introduces its arguments."""
        mark = self._syntax.args_mark
        found = buffer.find(mark, at, at + MAX_NAME + len(mark))
        if found < 0 and len(buffer) - at >= MAX_NAME + len(mark):
            self._give_up("")
            return at
        if found < 0:
            self._pending = buffer[at:]
            return len(buffer)
        self._reader = CallReader(("arguments",), name=self._clean(buffer[at:found]))
        self._raw_add(buffer[at : found + len(mark)])
        self._state, self._told = _State.CALL, False
        return found + len(mark)

    def _clean(self, name: str) -> str:
        """A name without what stands around it."""
        syntax = self._syntax
        name = name.strip().removeprefix(syntax.call_begin).strip()
        before = syntax.name_before + syntax.name_mark
        if before and before in name:
            name = name.rpartition(before)[2]
        if syntax.numbered and name.rpartition(":")[2].isdigit():
            name = name.rpartition(":")[0]
        return name or "?"

    def _call(self, buffer: str, at: int) -> int:
        reader = self._reader
        if reader is None:
            raise RuntimeError("in a call without a reader")
        stop = reader.feed(buffer, at)
        self._raw_add(buffer[at:stop])
        name = reader.name
        if name is not None and self._is_bare and name not in self._names:
            reader.broken = True
        elif name is not None:
            self._tell(name, reader.take())
        if reader.broken and not self._told:
            self._give_up("")
        elif reader.broken or reader.done:
            if reader.done and name is None:
                self._give_up("")
            elif reader.done and self._syntax.tags is not None and self._syntax.tags.ends_section:
                self._state, self._raw = _State.OUT, []
            else:
                self._state = _State.GAP
        return stop

    def _tell(self, name: str, args: str) -> None:
        """Tell the current call, or more of its arguments."""
        if not self._told:
            self._told, self._after_call, self._raw, self._space = True, True, [], []
            self.num_calls += 1
            if self.num_calls == 1 or self._parallel:
                numbered = f"functions.{name}:{self.num_calls - 1}"
                call_id = numbered if self._syntax.numbered else self._new_id(self._syntax)
                self._events.append(ToolStart(self._index, self.num_calls - 1, call_id, name))
        if args and (self.num_calls == 1 or self._parallel):
            self._events.append(ToolArgs(self._index, self.num_calls - 1, args))

    def _give_up(self, rest: str) -> None:
        """What looked like a call is text."""
        raw, self._raw = "".join(self._raw) + rest, []
        self._state, self._reader = _State.OUT, None
        self._text(raw)
        self._begun = True  # a bare call cannot begin any more
