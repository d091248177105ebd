"""What a chat answer is made of, for every dialect to write in its own words: a stream of ``ChatEvent``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal, Protocol

import msgspec

from octavo.api.generation import Generation, TextDelta
from octavo.protocol.generate import Logprob


class Text(msgspec.Struct, tag="text", gc=False):
    """A piece of the visible answer. ``token_ids`` and ``logprobs`` are those of the engine step it came from."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[list[Logprob]] | None = None


class Reasoning(msgspec.Struct, tag="reasoning", gc=False):
    """A piece of what the model thinks before it answers."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[list[Logprob]] | None = None


class ToolStart(msgspec.Struct, tag="tool_start", gc=False):
    """A tool call begins: its place in the answer, its id and the function's name."""

    index: int
    tool: int
    id: str
    name: str


class ToolArgs(msgspec.Struct, tag="tool_args", gc=False):
    """A piece of a tool call's arguments (JSON text)."""

    index: int
    tool: int
    text: str


EndReason = Literal["stop", "length", "repetition", "abort", "deadline", "tool_calls"]


class Finish(msgspec.Struct, tag="finish", gc=False):
    """One choice is complete, with the counts that its usage block needs."""

    index: int
    reason: EndReason
    stop_reason: str | int | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int


ChatEvent = Text | Reasoning | ToolStart | ToolArgs | Finish


class ChatFormat(Protocol):
    """How one model family writes its answers; one instance reads one choice. ``formats/`` holds the families."""

    def push(self, delta: TextDelta) -> list[ChatEvent]:
        """The events of one delta (``Finish`` is made by the caller)."""


class PlainFormat:
    """A family without reasoning or tool markers: everything is visible text."""

    def push(self, delta: TextDelta) -> list[ChatEvent]:
        """One ``Text``, also where its text is empty but tokens (and logprobs) came."""
        if not delta.text and not delta.token_ids:
            return []
        return [Text(delta.index, delta.text, delta.token_ids, delta.logprobs)]


async def chat_events(generation: Generation, formats: list[ChatFormat]) -> AsyncIterator[ChatEvent]:
    """The events of a generation; ``formats`` has one reader a choice. Closing it aborts the generation."""
    counts = [0] * len(formats)
    try:
        async for delta in generation:
            counts[delta.index] += len(delta.token_ids)
            for event in formats[delta.index].push(delta):
                yield event
            if delta.finish_reason is not None:
                yield Finish(
                    index=delta.index,
                    reason=delta.finish_reason,
                    stop_reason=delta.stop_reason,
                    num_prompt_tokens=delta.num_prompt_tokens,
                    num_cached_tokens=delta.num_cached_tokens,
                    num_generated_tokens=counts[delta.index],
                )
    finally:
        await generation.aclose()
