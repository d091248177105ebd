"""From request fields to ``SamplingParams``: names are copied, nothing is decided here but what OpenAI defines."""

from __future__ import annotations

from typing import Any

from octavo.api.openai.context import Context
from octavo.api.openai.schema import (
    NEUTRAL,
    NOT_YET,
    ChatCompletionRequest,
    CompletionRequest,
    SamplingFields,
)
from octavo.errors import RequestError
from octavo.protocol.generate import SamplingParams

COPIED = (
    *("n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "min_tokens", "ignore_eos"),
    *("skip_special_tokens", "include_stop_str_in_output"),
)


def check_fields(request: ChatCompletionRequest | CompletionRequest) -> None:
    """Refuse fields that are known but not served, and combinations that contradict each other."""
    names = NOT_YET[
        ChatCompletionRequest if isinstance(request, ChatCompletionRequest) else CompletionRequest
    ]
    for name in names:
        value = getattr(request, name)
        if value is not None and not any(_same(value, neutral) for neutral in NEUTRAL.get(name, ())):
            raise RequestError(f"{name} is not supported yet.", param=name, cure="Remove the field.")
    options = request.stream_options
    if options is not None:
        if not request.stream:
            raise RequestError("stream_options needs stream: true.", param="stream_options")
        if options.include_obfuscation:
            raise RequestError(
                "include_obfuscation is not supported yet.", param="stream_options.include_obfuscation"
            )
    if request.stream and request.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs cannot be streamed.", param="prompt_logprobs")


def sampling_params(
    context: Context,
    request: SamplingFields,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """The request's sampling over the model's defaults; ``max_tokens`` None means the rest of the context."""
    given: dict[str, Any] = {}
    for name in COPIED:
        value = getattr(request, name)
        if value is not None:
            given[name] = value
    return context.frontend.default_sampling(
        **given, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs
    )


def _same(value: Any, neutral: Any) -> bool:
    # In Python True == 1; a request that sends one for the other is wrong.
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
