"""Reads one choice: text in, events out. Whole replies and streams are both made of these events, so they agree."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from octavo.api.chat.events import (
    ChatEvent,
    ChatFormat,
    EndReason,
    Finish,
    Reasoning,
    Text,
    ToolArgs,
    ToolStart,
)
from octavo.api.chat.formats.reasoning import ReasoningParser
from octavo.api.chat.formats.tools import ToolParser
from octavo.api.generation import TextDelta


class AnswerReader(ChatFormat, Protocol):
    """What reads one choice of a chat answer."""

    num_reasoning_tokens: int

    def finish_reason(self, reason: EndReason) -> EndReason:
        """Why the choice ended, as chat dialects say it."""


class ChoiceReader:
    """Implements ``ChatFormat``: thoughts first (left out unless ``show_reasoning``), then tool calls in what is left."""

    def __init__(
        self,
        index: int,
        *,
        reasoning: ReasoningParser | None = None,
        tools: ToolParser | None = None,
        show_reasoning: bool = True,
    ) -> None:
        self._index = index
        self._reasoning = reasoning
        self._tools = tools
        self._show_reasoning = show_reasoning
        self.num_reasoning_tokens = 0  # counted by engine steps: one that ends the thoughts belongs to them

    def push(self, delta: TextDelta) -> list[ChatEvent]:
        """See ``ChatFormat.push``; the last delta brings what was held back."""
        events: list[ChatEvent] = []
        text = delta.text
        if self._reasoning is not None:
            thinking = self._reasoning.thinking
            events, text = self._reasoning.push(text)
            if delta.finish_reason is not None:
                more, rest = self._reasoning.finish()
                events, text = events + more, text + rest
            if thinking or self._reasoning.thinking:
                self.num_reasoning_tokens += len(delta.token_ids)
            if not self._show_reasoning:
                events = []
        if self._tools is None:
            return [*events, Text(self._index, text, [])] if text else events
        events += self._tools.push(text)
        if delta.finish_reason is not None:
            events += self._tools.finish()
        return events

    def finish_reason(self, reason: EndReason) -> EndReason:
        """Why the choice ended, as chat dialects say it: an answer that stops with calls is "tool_calls"."""
        return (
            "tool_calls" if reason == "stop" and self._tools is not None and self._tools.num_calls else reason
        )


def call_arguments(text: str) -> dict[str, Any]:
    """Arguments of a call as a value, for dialects that do not send them as text; what is no object stands under "_raw"."""
    try:
        value = msgspec.json.decode(text) if text.strip() else {}
    except (msgspec.DecodeError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"_raw": text}


class MessageFold:
    """Gathers the events of one choice into a message."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.thoughts: list[str] = []
        self.calls: list[ToolStart] = []
        self.arguments: list[list[str]] = []

    def add(self, event: ChatEvent) -> None:
        """Append what ``event`` brought."""
        if isinstance(event, Text):
            self.texts.append(event.text)
        elif isinstance(event, Reasoning):
            self.thoughts.append(event.text)
        elif isinstance(event, ToolStart):
            self.calls.append(event)
            self.arguments.append([])
        elif isinstance(event, ToolArgs):
            self.arguments[event.tool].append(event.text)
        elif isinstance(event, Finish):
            pass

    @property
    def text(self) -> str:
        """The visible answer."""
        return "".join(self.texts)

    @property
    def reasoning(self) -> str:
        """The thoughts."""
        return "".join(self.thoughts)
