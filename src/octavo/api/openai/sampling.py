"""From request fields to ``SamplingParams``: names are copied, nothing is decided here but what OpenAI defines."""

from __future__ import annotations

import asyncio
from typing import Any

from octavo.api.beam import check_beam_fields
from octavo.api.chat.tools import ToolPlan
from octavo.api.openai.context import Context
from octavo.api.openai.schema import (
    NEUTRAL,
    NOT_YET,
    ChatCompletionRequest,
    CompletionRequest,
    SamplingFields,
)
from octavo.errors import RequestError
from octavo.protocol.generate import SamplingParams, StructuredOutputsParams

COPIED = (
    *("n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "min_tokens", "ignore_eos"),
    *("skip_special_tokens", "include_stop_str_in_output", "allowed_token_ids", "bad_words"),
    *("repetition_detection", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_sequence_breakers"),
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
    if request.use_beam_search:
        check_beam_fields(request)
    elif request.length_penalty not in (None, 1.0):
        raise RequestError("length_penalty needs use_beam_search: true.", param="length_penalty")
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


async def structured_outputs(
    context: Context, request: SamplingFields, tools: ToolPlan | None = None
) -> StructuredOutputsParams | None:
    """What the answer must look like, from either of the two fields that say it, or from tools that must be called.

    Checked, so later use is quick.
    """
    if request.dry_multiplier:  # its breakers are looked up in the whole vocabulary
        await asyncio.to_thread(context.frontend.dry, sampling_params(context, request))
    params, param = request.structured_outputs, "structured_outputs"
    asked = request.response_format
    if asked is not None and asked.type != "text":
        if params is not None:
            raise RequestError(
                "response_format and structured_outputs exclude each other.", param="response_format"
            )
        param = "response_format"
        if asked.type == "json_object":
            params = StructuredOutputsParams(json_object=True)
        elif asked.type == "structural_tag":
            given = {name: getattr(asked, name) for name in ("structures", "triggers", "format")}
            params = StructuredOutputsParams(
                structural_tag={name: value for name, value in given.items() if value is not None}
            )
        elif asked.json_schema is None or asked.json_schema.schema is None:
            raise RequestError(
                "response_format of type json_schema needs json_schema.schema.",
                param="response_format.json_schema.schema",
            )
        else:
            params = StructuredOutputsParams(json=asked.json_schema.schema)
    if tools is not None:
        if params is not None:
            raise RequestError(
                f"{param} and tools exclude each other (but with tool_choice none).", param=param
            )
        params, param = tools.grammar, "tools"
    if params is not None:
        await context.frontend.grammars.grammar_async(params, param)
    return params


def sampling_params(
    context: Context,
    request: SamplingFields,
    *,
    max_tokens: int | None = None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    structured_outputs: StructuredOutputsParams | None = None,
    skip_special_tokens: bool | None = None,
) -> SamplingParams:
    """The request's sampling over the model's defaults; ``max_tokens`` None means the rest of the context."""
    given: dict[str, Any] = {}
    for name in COPIED:
        value = getattr(request, name)
        if value is not None:
            given[name] = value
    if skip_special_tokens is not None:
        given["skip_special_tokens"] = skip_special_tokens
    return context.frontend.default_sampling(
        **given,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        structured_outputs=structured_outputs,
    )


def _same(value: Any, neutral: Any) -> bool:
    # In Python True == 1; a request that sends one for the other is wrong.
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
