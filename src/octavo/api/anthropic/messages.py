"""``/v1/messages`` and ``/v1/messages/count_tokens``: chat events as Anthropic's messages and streams."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from octavo.api.anthropic.convert import NAMES, chat_request
from octavo.api.anthropic.schema import (
    BlockDelta,
    BlockStart,
    BlockStop,
    CountTokensRequest,
    Ending,
    InputPiece,
    MessageDelta,
    MessageReply,
    MessagesRequest,
    MessageStart,
    MessageStop,
    OutBlock,
    StopReason,
    StreamEvent,
    TextOut,
    TextPiece,
    ThinkingOut,
    ThinkingPiece,
    TokenCount,
    ToolUseOut,
    Usage,
)
from octavo.api.chat.events import ChatEvent, Finish, Reasoning, Text, ToolArgs, ToolStart
from octavo.api.chat.reader import MessageFold, call_arguments
from octavo.api.openai.context import Context, Stream, StreamForm
from octavo.api.openai.conversation import Conversation, count_prompt, renamed, start_chat

FORM = StreamForm(
    heartbeat=b'event: ping\ndata: {"type":"ping"}\n\n', done=b"", error_head=b"event: error\ndata: "
)
REASONS: dict[str, StopReason] = {"length": "max_tokens", "tool_calls": "tool_use"}


async def messages(context: Context, body: MessagesRequest) -> MessageReply | Stream:
    """Answer a conversation; a stream is a generator of encoded events."""
    with renamed(NAMES):
        chat = await start_chat(context, chat_request(body), "msg_")
    if body.stream:
        return Stream(_stream(chat), chat.run.close, FORM)
    fold, finish = await chat.fold()
    ending = _ending(finish)
    return MessageReply(
        id=chat.id,
        model=chat.model,
        content=_blocks(fold),
        stop_reason=ending.stop_reason,
        stop_sequence=ending.stop_sequence,
        usage=_usage(chat, finish),
    )


async def count_tokens(context: Context, body: CountTokensRequest) -> TokenCount:
    """How many tokens the prompt of such a request has."""
    with renamed(NAMES):
        return TokenCount(await count_prompt(context, chat_request(body)))


def _blocks(fold: MessageFold) -> list[OutBlock]:
    blocks: list[OutBlock] = []
    if fold.reasoning:
        blocks.append(ThinkingOut(fold.reasoning))
    if fold.text or not fold.calls:
        blocks.append(TextOut(fold.text))
    for call, parts in zip(fold.calls, fold.arguments):
        blocks.append(ToolUseOut(call.id, call.name, call_arguments("".join(parts))))
    return blocks


def _usage(chat: Conversation, finish: Finish | None) -> Usage:
    cached = finish.num_cached_tokens if finish is not None else sum(chat.run.cached_tokens)
    return Usage(
        input_tokens=chat.num_prompt_tokens - cached,
        output_tokens=0 if finish is None else finish.num_generated_tokens,
        cache_read_input_tokens=cached,
    )


def _ending(finish: Finish) -> Ending:
    if finish.reason == "stop" and isinstance(finish.stop_reason, str):
        return Ending("stop_sequence", finish.stop_reason)
    return Ending(REASONS.get(finish.reason, "end_turn"), None)


async def _stream(chat: Conversation) -> AsyncGenerator[bytes, None]:
    writer = _Writer()
    begun = False
    async with aclosing(chat.events()) as batches:
        async for batch in batches:
            data = b""
            if not begun:
                begun = True
                message = MessageReply(
                    id=chat.id,
                    model=chat.model,
                    content=[],
                    stop_reason=None,
                    stop_sequence=None,
                    usage=_usage(chat, None),
                )
                data = _event(MessageStart(message)) + FORM.heartbeat
            for event in batch:
                data += writer.event(event)
                if isinstance(event, Finish):
                    data += writer.close()
                    data += _event(MessageDelta(_ending(event), _usage(chat, event))) + _event(MessageStop())
            if data:
                yield data


class _Writer:
    """Cuts the events of an answer into content blocks."""

    def __init__(self) -> None:
        self.index = -1
        self.kind = ""  # of the open block

    def event(self, event: ChatEvent) -> bytes:
        """What one event adds."""
        if isinstance(event, Text):
            return self._add("text", TextOut(""), TextPiece(event.text)) if event.text else b""
        if isinstance(event, Reasoning):
            return self._add("thinking", ThinkingOut(""), ThinkingPiece(event.text))
        if isinstance(event, ToolStart):
            return self.close() + self._open("tool_use", ToolUseOut(event.id, event.name, {}))
        if isinstance(event, ToolArgs):
            return _event(BlockDelta(self.index, InputPiece(event.text)))
        return b"" if self.index >= 0 else self._open("text", TextOut(""))  # an answer without a word

    def close(self) -> bytes:
        """End the open block, if there is one."""
        if not self.kind:
            return b""
        self.kind = ""
        return _event(BlockStop(self.index))

    def _add(self, kind: str, block: OutBlock, piece: TextPiece | ThinkingPiece) -> bytes:
        head = b"" if self.kind == kind else self.close() + self._open(kind, block)
        return head + _event(BlockDelta(self.index, piece))

    def _open(self, kind: str, block: OutBlock) -> bytes:
        self.index += 1
        self.kind = kind
        return _event(BlockStart(self.index, block))


def _event(made: StreamEvent) -> bytes:
    """One server-sent event under its type's name."""
    name = made.__struct_config__.tag
    return b"event: " + str(name).encode() + b"\ndata: " + msgspec.json.encode(made) + b"\n\n"
