"""``/v1/chat/completions``: messages in, a message out, whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from msgspec import UNSET

from octavo.api.generation import TextDelta
from octavo.api.openai.context import Context, Stream, reply_id
from octavo.api.openai.folding import ChoiceFold, TextEvents, event
from octavo.api.openai.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from octavo.api.openai.prompts import chat_prompt
from octavo.api.openai.run import Run
from octavo.api.openai.sampling import check_fields, sampling_params, structured_outputs
from octavo.api.openai.schema import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatMessage,
)
from octavo.errors import RequestError


@dataclass(frozen=True)
class _Reply:
    """What every part of one reply repeats."""

    context: Context
    request: ChatCompletionRequest
    run: Run
    id: str
    model: str
    created: int

    @property
    def num_top(self) -> int:
        return self.request.top_logprobs or 0

    @property
    def names(self) -> TokenNames:
        as_ids = bool(self.request.return_tokens_as_token_ids)
        return TokenNames(self.context.frontend.tokenizer, as_ids=as_ids)


async def chat_completions(context: Context, request: ChatCompletionRequest) -> ChatCompletion | Stream:
    """Answer a conversation; a stream is a generator of encoded events."""
    model = context.check_model(request.model)
    check_fields(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs: true.", param="top_logprobs")
    if None not in (request.max_tokens, request.max_completion_tokens) and (
        request.max_tokens != request.max_completion_tokens
    ):
        raise RequestError(
            "max_tokens and max_completion_tokens differ.", param="max_tokens", cure="Send only the second."
        )
    sampling = sampling_params(
        context,
        request,
        max_tokens=request.max_completion_tokens or request.max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_logprobs=request.prompt_logprobs,
        structured_outputs=await structured_outputs(context, request),
    )
    prompt = await chat_prompt(context, request, sampling)
    request_id = reply_id("chatcmpl", request.request_id)
    run = Run(context, request, [prompt], request_id=request_id)
    reply = _Reply(context, request, run, request_id, model, int(time.time()))
    return Stream(_stream(reply), run.close) if request.stream else await _whole(reply)


async def _whole(reply: _Reply) -> ChatCompletion:
    run, request = reply.run, reply.request
    folds = [ChoiceFold() for _ in range(run.n)]
    async with aclosing(run.deltas()) as deltas:
        async for batch in deltas:
            for choice, delta in batch:
                folds[choice].add(delta)
    answer = ChatCompletion(
        id=reply.id,
        created=reply.created,
        model=reply.model,
        choices=[_choice(reply, i, fold) for i, fold in enumerate(folds)],
        usage=run.usage(),
        system_fingerprint=reply.context.fingerprint,
    )
    if request.return_token_ids:
        answer.prompt_token_ids = run.prompts[0][0]
    if request.prompt_logprobs is not None and folds[0].prompt_logprobs is not None:
        answer.prompt_logprobs = prompt_logprobs(
            reply.names, folds[0].prompt_logprobs, request.prompt_logprobs
        )
    return answer


def _choice(reply: _Reply, index: int, fold: ChoiceFold) -> ChatChoice:
    return ChatChoice(
        index=index,
        message=ChatMessage(content=fold.text),
        logprobs=chat_logprobs(reply.names, fold.logprobs, reply.num_top) if reply.request.logprobs else None,
        finish_reason=fold.finish_reason,
        stop_reason=fold.stop_reason,
        token_ids=fold.token_ids if reply.request.return_token_ids else UNSET,
    )


async def _stream(reply: _Reply) -> AsyncGenerator[bytes, None]:
    run, request = reply.run, reply.request
    options = request.stream_options
    with_usage = bool(options and options.include_usage)
    continuous = bool(options and options.continuous_usage_stats)
    only_text = not (request.logprobs or request.return_token_ids or continuous)
    blank = _chunk(reply, [], with_usage=with_usage)

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
                if only_text and delta.finish_reason is None:
                    if delta.text:
                        data += events.event(index, delta.text)
                elif delta.text or delta.token_ids or delta.finish_reason is not None:
                    blank.choices = [_chunk_choice(reply, index, delta)]
                    if continuous:
                        blank.usage = run.usage()
                    data += event(blank)
            if data:
                yield data
    if with_usage:
        blank.choices, blank.usage = [], run.usage()
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
    return chunk


def _chunk_choice(reply: _Reply, index: int, delta: TextDelta) -> ChatChunkChoice:
    choice = ChatChunkChoice(
        index=index, delta=ChatDelta(content=delta.text or None), finish_reason=delta.finish_reason
    )
    if reply.request.logprobs and delta.logprobs:
        choice.logprobs = chat_logprobs(reply.names, delta.logprobs, reply.num_top)
    if delta.finish_reason is not None:
        choice.stop_reason = delta.stop_reason
    if reply.request.return_token_ids:
        choice.token_ids = delta.token_ids
    return choice
