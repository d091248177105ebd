"""What both routes share in turning deltas into replies: the fold for whole replies, the fast text event for streams."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import msgspec

from octavo.api.chat.events import EndReason
from octavo.api.generation import TextDelta
from octavo.protocol.generate import Logprob

encode = msgspec.json.Encoder().encode


def event(chunk: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(chunk) + b"\n\n"


class TextEvents:
    """Events that carry only text, one kind for each choice: all but the text is encoded once.

    ``chunk_of(choice, text)`` makes the event's struct; the bytes around its text are kept, so that an event made here
    cannot differ from one encoded whole.
    """

    def __init__(self, chunk_of: Callable[[int, str], msgspec.Struct], num_choices: int) -> None:
        mark = uuid.uuid4().hex
        self.parts: list[tuple[bytes, bytes]] = []
        for choice in range(num_choices):
            head, tail = event(chunk_of(choice, mark)).split(b'"' + mark.encode() + b'"')
            self.parts.append((head, tail))

    def event(self, choice: int, text: str) -> bytes:
        """The event that adds ``text`` to ``choice``."""
        head, tail = self.parts[choice]
        return head + encode(text) + tail


class ChoiceFold:
    """Gathers the deltas of one choice."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[list[Logprob]] = []
        self.prompt_logprobs: list[list[Logprob]] | None = None
        self.finish_reason: EndReason | None = None
        self.stop_reason: str | int | None = None

    def add(self, delta: TextDelta) -> None:
        """Append what ``delta`` brought."""
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs += delta.logprobs
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_reason = delta.stop_reason

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self.texts)
