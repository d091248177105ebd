"""``/v1/.../render`` and ``/inference/v1/generate``: a request as tokens, and tokens answered with tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from msgspec import UNSET, UnsetType

from octavo.api.openai.context import Context, Stream, reply_id
from octavo.api.openai.conversation import render_chat
from octavo.api.openai.folding import ChoiceFold, event
from octavo.api.openai.logprobs import TokenNames, chat_logprobs
from octavo.api.openai.prompts import completion_prompts
from octavo.api.openai.run import Run
from octavo.api.openai.sampling import check_fields, sampling_params, structured_outputs
from octavo.api.openai.schema import (
    ChatCompletionRequest,
    ChatLogprobs,
    CompletionRequest,
    ModelName,
    SamplingFields,
    Usage,
)
from octavo.errors import RequestError
from octavo.protocol import bounds
from octavo.protocol.generate import SamplingParams


class StrictSampling(
    SamplingParams, kw_only=True, omit_defaults=True, frozen=True, forbid_unknown_fields=True
):
    """``SamplingParams``, of which an unknown field is an error."""


class TokensRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Body of ``POST /inference/v1/generate``, and what a render route makes of a request."""

    token_ids: bounds.TokenIds
    sampling_params: StrictSampling = StrictSampling()
    model: ModelName | None = None
    request_id: bounds.RequestId | None = None
    stream: bool | None = None
    priority: bounds.Priority | None = None
    cache_salt: bounds.CacheSalt | None = None


class Rendered(msgspec.Struct):
    """Reply of ``POST /v1/completions/render``: one request a prompt."""

    requests: list[TokensRequest]


class TokensChoice(msgspec.Struct, kw_only=True):
    """One answer as tokens, or in a stream what an event adds to it."""

    index: int
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: ChatLogprobs | None = None


class TokensReply(msgspec.Struct, kw_only=True):
    """Reply of ``POST /inference/v1/generate``, and each event of its stream."""

    request_id: str
    choices: list[TokensChoice]
    usage: Usage | UnsetType = UNSET


async def render_chat_request(context: Context, request: ChatCompletionRequest) -> TokensRequest:
    """The tokens and parameters that the engine would get; nothing is generated."""
    ids, sampling = await render_chat(context, request)
    return _rendered(request, ids, sampling)


async def render_completion(context: Context, request: CompletionRequest) -> Rendered:
    """The same for every prompt of a completion request."""
    context.check_model(request.model)
    check_fields(request)
    sampling = sampling_params(
        context,
        request,
        max_tokens=request.max_tokens or 1,
        logprobs=request.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        structured_outputs=await structured_outputs(context, request),
    )
    prompts = await completion_prompts(context, request, sampling)
    return Rendered([_rendered(request, prompt.ids, prompt.sampling) for prompt in prompts])


def _rendered(request: SamplingFields, ids: list[int], sampling: SamplingParams) -> TokensRequest:
    return TokensRequest(
        token_ids=ids,
        sampling_params=msgspec.convert(msgspec.to_builtins(sampling), StrictSampling),
        model=request.model,
        request_id=request.request_id,
        stream=request.stream,
        priority=request.priority,
        cache_salt=request.cache_salt,
    )


async def generate(context: Context, request: TokensRequest) -> TokensReply | Stream:
    """Tokens that go on from tokens; stop strings need text, so they are refused."""
    context.check_model(request.model)
    sampling: SamplingParams = request.sampling_params
    if sampling.stop_strings:
        raise RequestError(
            "stop strings need text.", param="sampling_params.stop", cure="Send stop_token_ids."
        )
    sampling = msgspec.structs.replace(sampling, detokenize=False)
    if sampling.structured_outputs is not None:
        await context.frontend.grammars.grammar_async(sampling.structured_outputs)
    ids, sampling = await context.frontend.prepare_async(request.token_ids, sampling)
    request_id = reply_id("gen-", request.request_id)
    standing = SamplingFields(priority=request.priority, cache_salt=request.cache_salt)
    run = Run(context, standing, [(ids, sampling)], request_id=request_id)
    if request.stream:
        return Stream(_stream(run, request_id), run.close)
    folds = [ChoiceFold() for _ in range(run.num_choices)]
    async with aclosing(run.deltas()) as deltas:
        async for batch in deltas:
            for choice, delta in batch:
                folds[choice].add(delta)
    names = TokenNames(context.frontend.tokenizer, as_ids=True)
    choices = [
        TokensChoice(
            index=i,
            token_ids=fold.token_ids,
            finish_reason=fold.finish_reason,
            stop_reason=fold.stop_reason,
            logprobs=None
            if sampling.logprobs is None
            else chat_logprobs(names, fold.logprobs, sampling.logprobs),
        )
        for i, fold in enumerate(folds)
    ]
    return TokensReply(request_id=request_id, choices=choices, usage=run.usage())


async def _stream(run: Run, request_id: str) -> AsyncGenerator[bytes, None]:
    async with aclosing(run.deltas()) as deltas:
        async for batch in deltas:
            data = b""
            for choice, delta in batch:
                made = TokensChoice(
                    index=choice,
                    token_ids=delta.token_ids,
                    finish_reason=delta.finish_reason,
                    stop_reason=delta.stop_reason,
                )
                data += event(TokensReply(request_id=request_id, choices=[made]))
            yield data
    yield event(TokensReply(request_id=request_id, choices=[], usage=run.usage()))
