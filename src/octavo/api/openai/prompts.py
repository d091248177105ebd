"""Prompts of both routes as checked token ids with their sampling parameters."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from octavo.api.chat.formats.families import GENERIC
from octavo.api.chat.request import ChatPrompt, ChatRequest
from octavo.api.chat.tools import ToolPlan
from octavo.api.frontend import LARGE_TEXT
from octavo.api.openai.context import Context
from octavo.api.openai.schema import ChatCompletionRequest, CompletionRequest
from octavo.errors import RequestError
from octavo.protocol import bounds
from octavo.protocol.generate import SamplingParams

MAX_PROMPTS = 2048


class CompletionPrompt(msgspec.Struct):
    """One prompt: its ids, its text (for ``echo``) and its parameters."""

    ids: list[int]
    text: str
    sampling: SamplingParams


def split_prompt(prompt: str | list[Any]) -> list[str | list[int]]:
    """The prompts in the four forms OpenAI allows; ``RequestError`` that names the wrong element."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("The prompt is empty.", param="prompt")
    if isinstance(prompt[0], int):
        return [_token_ids(prompt, "")]
    if len(prompt) > MAX_PROMPTS:
        raise RequestError(
            f"{len(prompt)} prompts, but at most {MAX_PROMPTS} in one request.", param="prompt"
        )
    if isinstance(prompt[0], str):
        for i, text in enumerate(prompt):
            if not isinstance(text, str):
                raise RequestError(f"prompt[{i}] must be a text like prompt[0].", param=f"prompt[{i}]")
        return list(prompt)
    return [_token_ids(ids, f"[{i}]") for i, ids in enumerate(prompt)]


async def completion_prompts(
    context: Context, request: CompletionRequest, sampling: SamplingParams
) -> list[CompletionPrompt]:
    """Every prompt of a completion request, checked; errors name the prompt."""
    frontend = context.frontend
    prompts = split_prompt(request.prompt)
    add_special_tokens = request.add_special_tokens is not False
    made = []
    for i, prompt in enumerate(prompts):
        try:
            if request.truncate_prompt_tokens is not None:
                if isinstance(prompt, str):
                    prompt = await encode_text(context, prompt, add_special_tokens)
                prompt = truncated(context, prompt, request.truncate_prompt_tokens, sampling)
            ids, own = await frontend.prepare_async(prompt, sampling, add_special_tokens=add_special_tokens)
        except RequestError as error:
            if len(prompts) == 1 or error.param != "prompt":
                raise
            raise RequestError(f"prompt[{i}]: {error.cause}", f"prompt[{i}]", error.cure) from None
        text = ""
        if request.echo:
            text = prompt if isinstance(prompt, str) else frontend.tokenizer.decode(ids)
        made.append(CompletionPrompt(ids, text, own))
    return made


def _token_ids(value: Any, where: str) -> list[int]:
    try:
        return msgspec.convert(value, bounds.TokenIds)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        name = f"prompt{where}{path.rstrip('`')}"
        raise RequestError(f"{name}: {text}.", param=name) from None


def truncated(context: Context, ids: list[int], most: int, sampling: SamplingParams) -> list[int]:
    """The last ``most`` tokens of a prompt; -1 keeps what leaves room for the answer that is asked for."""
    if most == -1:
        most = max(1, context.info.max_model_len - (sampling.max_tokens or 1))
    return ids[max(0, len(ids) - most) :]


async def encode_text(context: Context, text: str, add_special_tokens: bool) -> list[int]:
    """Token ids of any text, the empty one too; in a thread where the text is long."""
    tokenizer = context.frontend.tokenizer
    if len(text) > LARGE_TEXT:
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)
    return tokenizer.encode(text, add_special_tokens)


async def chat_ids(
    context: Context, request: ChatCompletionRequest, tools: ToolPlan | None = None
) -> list[int]:
    """Token ids of the conversation (and its tools) put through the chat template."""
    frontend = context.frontend
    template = await context.templates.choose(request.chat_template)
    continues = bool(request.continue_final_message)
    chat = ChatRequest(
        messages=request.messages or [],
        # An open last message and the header of a new one exclude each other: asking for the first is enough.
        add_generation_prompt=not continues
        if request.add_generation_prompt is None
        else request.add_generation_prompt,
        continue_final_message=continues,
        add_special_tokens=bool(request.add_special_tokens),
        chat_template_kwargs=request.chat_template_kwargs or {},
        tools=None if tools is None else [tool.for_template() for tool in tools.tools],
        documents=request.documents,
        explain_tools=frontend.tool_syntax is GENERIC,
    )
    prompt = ChatPrompt(frontend.tokenizer, template)
    if template is not frontend.template:  # how long it takes is the client's choice
        return await asyncio.to_thread(prompt.token_ids, chat)
    return await prompt.token_ids_async(chat)


async def chat_prompt(
    context: Context,
    request: ChatCompletionRequest,
    sampling: SamplingParams,
    tools: ToolPlan | None = None,
    before: Sequence[int] = (),
) -> tuple[list[int], SamplingParams]:
    """The conversation as checked token ids behind those of ``before``, with its parameters; errors name ``messages``."""
    ids = await chat_ids(context, request, tools)
    if before:  # the text begins in ``before``, its first token too
        bos = context.frontend.tokenizer.bos_token_id
        ids = [*before, *(ids[1:] if ids[:1] == [bos] else ids)]
    if request.truncate_prompt_tokens is not None:
        ids = truncated(context, ids, request.truncate_prompt_tokens, sampling)
    try:
        return context.frontend.prepare(ids, sampling)
    except RequestError as error:
        if error.param != "prompt":
            raise
        raise RequestError(error.cause, "messages", error.cure) from None
