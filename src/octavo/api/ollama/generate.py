"""``/api/chat`` and ``/api/generate``: chat events as Ollama's replies and lines."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar

import msgspec

from octavo.api.chat.events import ChatEvent, Finish, Reasoning, Text, ToolArgs, ToolStart
from octavo.api.chat.reader import MessageFold, call_arguments
from octavo.api.ollama.convert import NAMES, chat_request, served_name
from octavo.api.ollama.schema import (
    ChatReply,
    ChatRequest,
    FunctionCall,
    GenerateReply,
    GenerateRequest,
    ReplyMessage,
    Timings,
    ToolCall,
)
from octavo.api.openai.context import Context, Stream, StreamForm
from octavo.api.openai.conversation import Conversation, renamed, start_chat

FORM = StreamForm("application/x-ndjson", heartbeat=b"", done=b"", error_head=b"", error_tail=b"\n")
SEPARATORS = tuple((chr(code).encode(), b"\\u%04x" % code) for code in (0x85, 0x2028, 0x2029))
R = TypeVar("R", ChatReply, GenerateReply)


async def chat(context: Context, body: ChatRequest) -> ChatReply | Stream:
    """Answer a conversation; one without messages only asks for the model, which is loaded."""
    clock = Clock()
    if not body.messages:
        name = context.check_model(served_name(context, body.model))
        reply = ChatReply(model=name, created_at=now(), message=ReplyMessage(), done=True, done_reason="load")
        return reply if body.stream is False else _one(reply)
    with renamed(NAMES):
        request = chat_request(context, body)
        started = await start_chat(context, request, "chat-")

    def make(fold: MessageFold, done: bool) -> ChatReply:
        message = ReplyMessage(content=fold.text)
        if fold.reasoning:
            message.thinking = fold.reasoning
        if fold.calls:
            message.tool_calls = _calls(fold)
        return ChatReply(model=started.model, created_at=now(), message=message, done=done)

    return await _answer(started, make, clock)


async def generate(context: Context, body: GenerateRequest) -> GenerateReply | Stream:
    """Answer one prompt; an empty one only asks for the model, which is loaded."""
    clock = Clock()
    if not body.prompt and not body.context:
        name = context.check_model(served_name(context, body.model))
        reply = GenerateReply(model=name, created_at=now(), response="", done=True, done_reason="load")
        return reply if body.stream is False else _one(reply)
    with renamed(NAMES):
        request = chat_request(context, body)
        raw = body.prompt if body.raw else None
        started = await start_chat(context, request, "gen-", before=body.context or (), raw=raw)

    def make(fold: MessageFold, done: bool) -> GenerateReply:
        reply = GenerateReply(model=started.model, created_at=now(), response=fold.text, done=done)
        if fold.reasoning:
            reply.thinking = fold.reasoning
        if done and not body.raw:
            reply.context = [*started.run.prompts[0][0], *started.answer_ids]
        return reply

    return await _answer(started, make, clock)


@dataclass
class Clock:
    """When a request came, when its first token was there."""

    begin_ns: int = field(default_factory=time.perf_counter_ns)
    first_ns: int = 0

    def token(self) -> None:
        """Something was generated."""
        self.first_ns = self.first_ns or time.perf_counter_ns()

    def stamp(self, reply: Timings, finish: Finish) -> None:
        """Write counts and durations; the model is loaded already, so loading takes none."""
        end = time.perf_counter_ns()
        first = self.first_ns or end
        reply.done_reason = finish.reason if finish.reason == "length" else "stop"
        reply.total_duration = end - self.begin_ns
        reply.load_duration = 0
        reply.prompt_eval_count = finish.num_prompt_tokens
        reply.prompt_eval_duration = first - self.begin_ns
        reply.eval_count = finish.num_generated_tokens
        reply.eval_duration = end - first


async def _answer(started: Conversation, make: Callable[[MessageFold, bool], R], clock: Clock) -> R | Stream:
    if started.request.stream:
        return Stream(_lines(started, make, clock), started.run.close, FORM)
    whole = MessageFold()
    finish: Finish | None = None
    async with aclosing(started.events()) as batches:
        async for batch in batches:
            clock.token()
            for event in batch:
                whole.add(event)
                finish = event if isinstance(event, Finish) else finish
    if finish is None:
        raise RuntimeError("a generation ended without a last delta")
    reply = make(whole, True)
    clock.stamp(reply, finish)
    return reply


async def _lines(
    started: Conversation, make: Callable[[MessageFold, bool], R], clock: Clock
) -> AsyncGenerator[bytes, None]:
    """A line for every step that brought text, and for every whole call; the last one has the counts."""
    part = _Part()
    async with aclosing(started.events()) as batches:
        async for batch in batches:
            clock.token()
            finish: Finish | None = None
            for event in batch:
                part.add(event)
                finish = event if isinstance(event, Finish) else finish
            fold = part.take(complete=finish is not None)
            data = line(make(fold, False)) if fold.texts or fold.thoughts or fold.calls else b""
            if finish is not None:
                last = make(MessageFold(), True)
                clock.stamp(last, finish)
                data += line(last)
            if data:
                yield data


class _Part:
    """What came since the last line; a call is held back until it is whole."""

    def __init__(self) -> None:
        self.fold = MessageFold()
        self.call: tuple[ToolStart, list[str]] | None = None

    def add(self, event: ChatEvent) -> None:
        """One more event."""
        if isinstance(event, ToolStart):
            self._close_call()
            self.call = (event, [])
        elif isinstance(event, ToolArgs) and self.call is not None:
            self.call[1].append(event.text)
        elif isinstance(event, Text | Reasoning) and event.text:
            self.fold.add(event)

    def take(self, *, complete: bool) -> MessageFold:
        """What can be told now; everything where the answer is ``complete``."""
        if complete:
            self._close_call()
        taken, self.fold = self.fold, MessageFold()
        return taken

    def _close_call(self) -> None:
        if self.call is not None:
            self.fold.calls.append(self.call[0])
            self.fold.arguments.append(self.call[1])
            self.call = None


def _calls(fold: MessageFold) -> list[ToolCall]:
    return [
        ToolCall(FunctionCall(call.name, call_arguments("".join(parts)), index=call.tool), id=call.id)
        for call, parts in zip(fold.calls, fold.arguments)
    ]


def _one(reply: msgspec.Struct) -> Stream:
    """A stream of one line."""

    async def lines() -> AsyncGenerator[bytes, None]:
        yield line(reply)

    return Stream(lines(), lambda: None, FORM)


def line(reply: msgspec.Struct) -> bytes:
    """One line of a stream. Clients that read text cut lines at Unicode's separators too, so those are escaped."""
    data = msgspec.json.encode(reply)
    for character, escape in SEPARATORS:
        data = data.replace(character, escape)
    return data + b"\n"


def now() -> str:
    """This moment as Ollama writes it."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
