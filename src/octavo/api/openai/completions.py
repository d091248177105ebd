"""``/v1/completions``: a prompt continued, whole or as a stream; with ``echo`` also a way to score a text."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from msgspec import UNSET

from octavo.api.chat.thinking import plan_thinking
from octavo.api.generation import TextDelta
from octavo.api.openai.context import Context, Stream, reply_id
from octavo.api.openai.folding import ChoiceFold, TextEvents, event
from octavo.api.openai.logprobs import TokenNames, completion_logprobs, prompt_logprobs
from octavo.api.openai.prompts import CompletionPrompt, completion_prompts
from octavo.api.openai.run import Run
from octavo.api.openai.sampling import check_fields, sampling_params, structured_outputs
from octavo.api.openai.schema import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from octavo.errors import RequestError
from octavo.protocol.generate import Logprob, Thinking


@dataclass
class _Reply:
    """What every part of one reply repeats; ``offsets`` are the characters so far, a choice each (logprobs)."""

    context: Context
    request: CompletionRequest
    prompts: list[CompletionPrompt]
    run: Run
    id: str
    model: str
    created: int
    names: TokenNames
    offsets: list[int] = field(default_factory=list)

    @property
    def scores_only(self) -> bool:
        """True where one token is generated, because the engine has to, and thrown away."""
        return self.request.max_tokens == 0

    def prompt_of(self, choice: int) -> CompletionPrompt:
        return self.prompts[choice // self.run.n]


async def completions(context: Context, request: CompletionRequest) -> Completion | Stream:
    """Continue one or more prompts; a stream is a generator of encoded events."""
    model = context.check_model(request.model)
    check_fields(request)
    if request.max_tokens == 0 and not request.echo:
        raise RequestError("max_tokens must be at least 1 without echo.", param="max_tokens")
    wants_prompt = request.prompt_logprobs
    if request.echo and request.logprobs is not None:
        wants_prompt = max(request.logprobs, wants_prompt or 0)
    sampling = sampling_params(
        context,
        request,
        max_tokens=1 if request.max_tokens == 0 else request.max_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=wants_prompt,
        structured_outputs=await structured_outputs(context, request),
    )
    prompts = await completion_prompts(context, request, sampling)
    request_id = reply_id("cmpl-", request.request_id)
    run = Run(
        context,
        request,
        [(prompt.ids, prompt.sampling) for prompt in prompts],
        request_id=request_id,
        counts_output=request.max_tokens != 0,
        thinking=_watched(context, request.thinking_token_budget, prompts),
    )
    names = TokenNames(context.frontend.tokenizer, as_ids=bool(request.return_tokens_as_token_ids))
    reply = _Reply(context, request, prompts, run, request_id, model, int(time.time()), names)
    reply.offsets = [0] * run.num_choices
    return Stream(_stream(reply), run.close) if request.stream else await _whole(reply)


def _watched(context: Context, budget: int | None, prompts: list[CompletionPrompt]) -> list[Thinking | None]:
    """What the engine watches of each prompt; thoughts stay in the text, as all that the model writes."""
    if budget is None or budget < 0:
        return []
    frontend = context.frontend
    plans = [
        plan_thinking(
            frontend.thinking,
            prompt.ids,
            frontend.tokenizer,
            budget=budget,
            has_grammar=prompt.sampling.structured_outputs is not None,
        )
        for prompt in prompts
    ]
    return [None if plan is None else plan.engine for plan in plans]


async def _whole(reply: _Reply) -> Completion:
    run = reply.run
    folds = [ChoiceFold() for _ in range(run.num_choices)]
    async with aclosing(run.deltas()) as deltas:
        async for batch in deltas:
            for choice, delta in batch:
                folds[choice].add(delta)
    return Completion(
        id=reply.id,
        created=reply.created,
        model=reply.model,
        system_fingerprint=reply.context.fingerprint,
        choices=[_choice(reply, i, fold) for i, fold in enumerate(folds)],
        usage=run.usage(),
    )


def _choice(reply: _Reply, index: int, fold: ChoiceFold) -> CompletionChoice:
    request, prompt = reply.request, reply.prompt_of(index)
    parts = [_echo(reply, index, fold.prompt_logprobs)] if request.echo else []
    if not reply.scores_only:
        parts.append((fold.text, _logprobs(reply, index, fold.token_ids, fold.logprobs)))
    choice = CompletionChoice(
        index=index,
        text="".join(text for text, _ in parts),
        logprobs=_joined([logprobs for _, logprobs in parts if logprobs is not None]),
        finish_reason="length" if reply.scores_only else fold.finish_reason,
        stop_reason=None if reply.scores_only else fold.stop_reason,
    )
    if request.return_token_ids:
        choice.token_ids = [] if reply.scores_only else fold.token_ids
        choice.prompt_token_ids = prompt.ids
    if request.prompt_logprobs is not None and fold.prompt_logprobs is not None:
        choice.prompt_logprobs = prompt_logprobs(reply.names, fold.prompt_logprobs, request.prompt_logprobs)
    return choice


async def _stream(reply: _Reply) -> AsyncGenerator[bytes, None]:
    run, request = reply.run, reply.request
    options = request.stream_options
    with_usage = bool(options and options.include_usage)
    continuous = bool(options and options.continuous_usage_stats)
    only_text = request.logprobs is None and not (request.return_token_ids or continuous or reply.scores_only)

    def chunk(choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=reply.id,
            created=reply.created,
            model=reply.model,
            system_fingerprint=reply.context.fingerprint,
            choices=choices,
            usage=None if with_usage else UNSET,
        )

    num_choices = run.num_choices
    events = TextEvents(lambda index, text: chunk([CompletionChoice(index=index, text=text)]), num_choices)
    begun = [False] * num_choices
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
                    if request.echo or request.return_token_ids:
                        data += event(chunk([_first_choice(reply, index, delta)]))
                if only_text and delta.finish_reason is None:
                    if delta.text:
                        data += events.event(index, delta.text)
                elif delta.text or delta.token_ids or delta.finish_reason is not None:
                    whole = chunk([_delta_choice(reply, index, delta)])
                    if continuous:
                        whole.usage = run.usage()
                    data += event(whole)
            if data:
                yield data
    if with_usage:
        last = chunk([])
        last.usage = run.usage()
        yield event(last)


def _first_choice(reply: _Reply, index: int, delta: TextDelta) -> CompletionChoice:
    """The event that opens a choice: the echoed prompt and its token ids, where asked for."""
    choice = CompletionChoice(index=index, text="")
    if reply.request.echo:
        choice.text, choice.logprobs = _echo(reply, index, delta.prompt_logprobs)
    if reply.request.return_token_ids:
        choice.token_ids, choice.prompt_token_ids = [], reply.prompt_of(index).ids
    return choice


def _delta_choice(reply: _Reply, index: int, delta: TextDelta) -> CompletionChoice:
    if reply.scores_only:
        choice = CompletionChoice(index=index, text="")
        if delta.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = "length", None
        if reply.request.return_token_ids:
            choice.token_ids = []
        return choice
    choice = CompletionChoice(
        index=index,
        text=delta.text,
        logprobs=_logprobs(reply, index, delta.token_ids, delta.logprobs or []),
        finish_reason=delta.finish_reason,
    )
    if delta.finish_reason is not None:
        choice.stop_reason = delta.stop_reason
    if reply.request.return_token_ids:
        choice.token_ids = delta.token_ids
    return choice


def _echo(
    reply: _Reply, index: int, rows: list[list[Logprob]] | None
) -> tuple[str, CompletionLogprobs | None]:
    """The prompt as the beginning of the reply; its first token has no log probability."""
    prompt = reply.prompt_of(index)
    if reply.request.logprobs is None:
        return prompt.text, None
    logprobs, reply.offsets[index] = completion_logprobs(
        reply.names, prompt.ids, [None, *(rows or [])], reply.request.logprobs, reply.offsets[index]
    )
    return prompt.text, logprobs


def _logprobs(
    reply: _Reply, index: int, token_ids: list[int], rows: list[list[Logprob]]
) -> CompletionLogprobs | None:
    if reply.request.logprobs is None:
        return None
    logprobs, reply.offsets[index] = completion_logprobs(
        reply.names, token_ids, rows, reply.request.logprobs, reply.offsets[index]
    )
    return logprobs


def _joined(parts: list[CompletionLogprobs]) -> CompletionLogprobs | None:
    if not parts:
        return None
    whole = parts[0]
    for part in parts[1:]:
        whole.tokens += part.tokens
        whole.token_logprobs += part.token_logprobs
        whole.top_logprobs += part.top_logprobs
        whole.text_offset += part.text_offset
    return whole
