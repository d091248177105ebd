"""Reads gpt-oss answers: messages on channels (OpenAI's Harmony format), which are thoughts, calls, or the answer.

<|channel|>analysis<|message|>thoughts<|end|>
<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>
<|start|>assistant<|channel|>final<|message|>answer<|return|>
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from enum import Enum, auto

from octavo.api.chat.events import ChatEvent, EndReason, Reasoning, Text, ToolArgs, ToolStart
from octavo.api.chat.formats.markers import partial_marker
from octavo.api.generation import TextDelta

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>", START)
HEADS = (START, CHANNEL, "to=")  # with these an answer begins that has a header
MAX_HEADER = 1024
_END = re.compile("|".join(map(re.escape, ENDS)))
_RECIPIENT = re.compile(r"to=(?:functions\.)?([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


class _At(Enum):
    BEGIN = auto()
    HEADER = auto()
    BODY = auto()


def speaks_harmony(source: str | None) -> bool:
    """Whether a chat template writes messages on channels."""
    return source is not None and CHANNEL in source and MESSAGE in source


def random_call_id() -> str:
    """An id for a call."""
    return f"call_{uuid.uuid4().hex[:24]}"


class HarmonyReader:
    """Implements ``AnswerReader`` for choice ``index``; its special tokens must be part of the text."""

    def __init__(
        self,
        index: int,
        *,
        parallel: bool = True,
        show_reasoning: bool = True,
        new_id: Callable[[], str] = random_call_id,
    ) -> None:
        self.num_reasoning_tokens = 0
        self._index = index
        self._parallel = parallel
        self._show_reasoning = show_reasoning
        self._new_id = new_id
        self._at = _At.BEGIN
        self._header = ""
        self._kind = "final"
        self._num_calls = 0
        self._pending = ""
        self._told = False  # something of this message
        self._has_args = False

    def push(self, delta: TextDelta) -> list[ChatEvent]:
        """See ``ChatFormat.push``."""
        events: list[ChatEvent] = []
        thinking = self._thinking
        buffer, self._pending = self._pending + delta.text, ""
        at = 0
        while at < len(buffer):
            if self._at is _At.BODY:
                at = self._in_body(buffer, at, events)
            elif self._at is _At.HEADER:
                at = self._in_header(buffer, at)
            else:
                at = self._begin(buffer, at)
        if thinking or self._thinking:
            self.num_reasoning_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            self._finish(events)
        return events

    @property
    def _thinking(self) -> bool:
        return self._at is _At.BODY and self._kind == "analysis"

    def finish_reason(self, reason: EndReason) -> EndReason:
        """An answer that stops with calls ends because of them."""
        return "tool_calls" if reason == "stop" and self._num_calls else reason

    def _begin(self, buffer: str, at: int) -> int:
        """An answer that begins without a header is text."""
        head = buffer[at:].lstrip()
        undecided = len(head) < len(CHANNEL) and any(mark.startswith(head) for mark in HEADS)
        if undecided and len(buffer) - at < MAX_HEADER:
            self._pending = buffer[at:]
            return len(buffer)
        self._at = _At.HEADER if head.startswith(HEADS) else _At.BODY
        return at

    def _in_header(self, buffer: str, at: int) -> int:
        found = buffer.find(MESSAGE, at)
        keep = partial_marker(buffer, at, MESSAGE) if found < 0 else 0
        end = len(buffer) - keep if found < 0 else found
        self._header = (self._header + buffer[at:end])[:MAX_HEADER]
        if found < 0:
            self._pending = buffer[end:]
            return len(buffer)
        channel, recipient = _CHANNEL.search(self._header), _RECIPIENT.search(self._header)
        self._header, self._told, self._at = "", False, _At.BODY
        self._kind = channel[1] if channel else "final"
        if recipient is not None and recipient[1] != "assistant":
            self._kind = f"to={recipient[1]}"
        return found + len(MESSAGE)

    def _in_body(self, buffer: str, at: int, events: list[ChatEvent]) -> int:
        found = _END.search(buffer, at)
        if found is None:
            keep = max(partial_marker(buffer, at, end) for end in ENDS)
            self._tell(buffer[at : len(buffer) - keep], events)
            self._pending = buffer[len(buffer) - keep :]
            return len(buffer)
        self._tell(buffer[at : found.start()], events)
        self._end(events)
        self._at, self._header = _At.HEADER, ""
        return found.end()

    def _tell(self, text: str, events: list[ChatEvent]) -> None:
        if self._kind.startswith("to="):
            self._call(text, events)
        elif text and self._kind == "analysis":
            if self._show_reasoning:
                events.append(Reasoning(self._index, text, []))
        elif text:
            events.append(Text(self._index, text, []))

    def _call(self, text: str, events: list[ChatEvent]) -> None:
        if not self._told:
            self._told, self._has_args = True, False
            self._num_calls += 1
            if self._wanted:
                name = self._kind.removeprefix("to=")
                events.append(ToolStart(self._index, self._num_calls - 1, self._new_id(), name))
        self._has_args = self._has_args or bool(text)
        if text and self._wanted:
            events.append(ToolArgs(self._index, self._num_calls - 1, text))

    @property
    def _wanted(self) -> bool:
        return self._parallel or self._num_calls == 1

    def _end(self, events: list[ChatEvent]) -> None:
        """A message is complete; a call of a function without arguments has none."""
        if self._kind.startswith("to="):
            self._call("" if self._told and self._has_args else "{}", events)

    def _finish(self, events: list[ChatEvent]) -> None:
        rest, self._pending = self._pending, ""
        if self._at is _At.BODY or (self._at is _At.BEGIN and rest):
            self._tell(rest, events)
            self._end(events)
