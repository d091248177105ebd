"""``/v1/chat/completions``: messages in, a message out, whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from msgspec import UNSET, UnsetType

from octavo.api.chat.events import EndReason
from octavo.api.chat.reader import MessageFold
from octavo.api.generation import TextDelta
from octavo.api.openai.context import Context, Stream
from octavo.api.openai.conversation import Conversation, start_chat
from octavo.api.openai.folding import ChoiceFold, TextEvents, event
from octavo.api.openai.functions import old_delta, old_message, old_reason
from octavo.api.openai.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from octavo.api.openai.schema import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatMessage,
)
from octavo.api.openai.tools import chat_deltas, chat_message
from octavo.api.text.messages import content_text


class _Reply(Conversation):
    """A conversation in OpenAI's words."""

    @property
    def num_top(self) -> int:
        return self.request.top_logprobs or 0

    @property
    def echoed(self) -> str:
        """With ``echo``: the text of a last message of the assistant, which the answer goes on from."""
        last = self.request.messages[-1]
        if not self.request.echo or last.get("role") != "assistant":
            return ""
        return content_text(last.get("content"), "messages[-1].content") or ""

    @property
    def prompt_text(self) -> str | UnsetType:
        """The prompt as the model reads it, where it was asked for."""
        if not self.request.return_prompt_text:
            return UNSET
        tokenizer = self.context.frontend.tokenizer
        return tokenizer.decode(self.run.prompts[0][0], skip_special_tokens=False)

    @property
    def names(self) -> TokenNames:
        as_ids = bool(self.request.return_tokens_as_token_ids)
        return TokenNames(self.context.frontend.tokenizer, as_ids=as_ids)


async def chat_completions(context: Context, request: ChatCompletionRequest) -> ChatCompletion | Stream:
    """Answer a conversation; a stream is a generator of encoded events."""
    started = await start_chat(context, request, "chatcmpl-")
    reply = _Reply(**vars(started))
    return Stream(_stream(reply), reply.run.close) if request.stream else await _whole(reply)


async def _whole(reply: _Reply) -> ChatCompletion:
    run, request = reply.run, reply.request
    folds = [ChoiceFold() for _ in range(run.n)]
    messages = [MessageFold() for _ in range(run.n)]
    async with aclosing(run.deltas()) as deltas:
        async for batch in deltas:
            for choice, delta in batch:
                folds[choice].add(delta)
                if reply.readers is not None:
                    for part in reply.readers[choice].push(delta):
                        messages[choice].add(part)
    answer = ChatCompletion(
        id=reply.id,
        created=reply.created,
        model=reply.model,
        choices=[_choice(reply, i, fold, message) for i, (fold, message) in enumerate(zip(folds, messages))],
        usage=reply.usage(),
        system_fingerprint=reply.context.fingerprint,
        prompt_text=reply.prompt_text,
    )
    if request.return_token_ids:
        answer.prompt_token_ids = run.prompts[0][0]
    if request.prompt_logprobs is not None and folds[0].prompt_logprobs is not None:
        answer.prompt_logprobs = prompt_logprobs(
            reply.names, folds[0].prompt_logprobs, request.prompt_logprobs
        )
    return answer


def _choice(reply: _Reply, index: int, fold: ChoiceFold, message: MessageFold) -> ChatChoice:
    reason: EndReason | None = fold.finish_reason
    if reply.readers is not None and reason is not None:
        reason = reply.readers[index].finish_reason(reason)
    said = ChatMessage(content=fold.text) if reply.readers is None else chat_message(message)
    if echoed := reply.echoed:
        said.content = echoed + (said.content or "")
    if reply.request.functions:
        old_message(said)
    return ChatChoice(
        index=index,
        message=said,
        logprobs=chat_logprobs(reply.names, fold.logprobs, reply.num_top) if reply.request.logprobs else None,
        finish_reason=old_reason(reason) if reply.request.functions else reason,
        stop_reason=fold.stop_reason,
        token_ids=fold.token_ids if reply.request.return_token_ids else UNSET,
    )


async def _stream(reply: _Reply) -> AsyncGenerator[bytes, None]:
    run, request = reply.run, reply.request
    options = request.stream_options
    with_usage = bool(options and options.include_usage)
    continuous = bool(options and options.continuous_usage_stats)
    only_text = reply.readers is None and not (request.logprobs or request.return_token_ids or continuous)
    blank = _chunk(reply, [], with_usage=with_usage)
    echoed = reply.echoed

    def text_chunk(index: int, text: str) -> ChatCompletionChunk:
        choice = ChatChunkChoice(index=index, delta=ChatDelta(content=text))
        return _chunk(reply, [choice], with_usage=with_usage)

    events = TextEvents(text_chunk, run.n)
    begun = [False] * run.n
    async with aclosing(run.deltas()) as deltas:
        async for batch in deltas:
            data = b""
            for index, delta in batch:
                if only_text and begun[index] and delta.finish_reason is None:
                    if delta.text:
                        data += events.event(index, delta.text)
                    continue
                if not begun[index]:
                    begun[index] = True
                    data += event(_first_chunk(reply, index, blank))
                    if echoed:
                        data += events.event(index, echoed)
                if only_text and delta.finish_reason is None:
                    if delta.text:
                        data += events.event(index, delta.text)
                else:
                    for choice in _chunk_choices(reply, index, delta):
                        blank.choices = [choice]
                        if continuous:
                            blank.usage = reply.usage()
                        data += event(blank)
            if data:
                yield data
    if with_usage:
        blank.choices, blank.usage = [], reply.usage()
        yield event(blank)


def _chunk(reply: _Reply, choices: list[ChatChunkChoice], *, with_usage: bool) -> ChatCompletionChunk:
    return ChatCompletionChunk(
        id=reply.id,
        created=reply.created,
        model=reply.model,
        system_fingerprint=reply.context.fingerprint,
        choices=choices,
        usage=None if with_usage else UNSET,
    )


def _first_chunk(reply: _Reply, index: int, blank: ChatCompletionChunk) -> ChatCompletionChunk:
    """The event that opens a choice: the role, and the prompt's token ids where asked for."""
    choice = ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""))
    chunk = _chunk(reply, [choice], with_usage=blank.usage is not UNSET)
    if reply.request.return_token_ids and index == 0:
        chunk.prompt_token_ids = reply.run.prompts[0][0]
    if index == 0:
        chunk.prompt_text = reply.prompt_text
    return chunk


def _chunk_choices(reply: _Reply, index: int, delta: TextDelta) -> list[ChatChunkChoice]:
    """The events of one delta: the first has its tokens and log probabilities, the last the end."""
    request, reason = reply.request, delta.finish_reason
    if reply.readers is None:
        parts = [ChatDelta(content=delta.text or None)] if delta.text or delta.token_ids or reason else []
        ending: EndReason | None = reason
    else:
        parts = chat_deltas(reply.readers[index].push(delta))
        if not parts and (reason or (delta.token_ids and (request.logprobs or request.return_token_ids))):
            parts = [ChatDelta()]
        ending = None if reason is None else reply.readers[index].finish_reason(reason)
    if request.functions:
        for part in parts:
            old_delta(part)
    choices = [ChatChunkChoice(index=index, delta=part) for part in parts]
    if not choices:
        return []
    if request.logprobs and delta.logprobs:
        choices[0].logprobs = chat_logprobs(reply.names, delta.logprobs, reply.num_top)
    if request.return_token_ids:
        for choice in choices:
            choice.token_ids = delta.token_ids if choice is choices[0] else []
    if reason is not None:
        choices[-1].finish_reason = old_reason(ending) if request.functions else ending
        choices[-1].stop_reason = delta.stop_reason
    return choices
