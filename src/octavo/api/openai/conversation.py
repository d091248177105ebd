"""A chat request on its way: what every dialect starts, and the neutral events it writes in its own words."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec

from octavo.api.chat.effort import asked_thinking
from octavo.api.chat.events import ChatEvent, Finish, PlainFormat
from octavo.api.chat.reader import ChoiceReader, MessageFold
from octavo.api.chat.thinking import plan_thinking
from octavo.api.openai.context import Context, reply_id
from octavo.api.openai.prompts import chat_prompt
from octavo.api.openai.run import Run
from octavo.api.openai.sampling import check_fields, sampling_params, structured_outputs
from octavo.api.openai.schema import ChatCompletionRequest
from octavo.api.openai.tools import choice_readers, tool_plan
from octavo.errors import RequestError


@dataclass(frozen=True)
class Conversation:
    """One chat request that the engine works on. ``readers`` is None where everything is visible text."""

    context: Context
    request: ChatCompletionRequest
    run: Run
    id: str
    model: str
    created: int
    readers: list[ChoiceReader] | None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.run.prompts[0][0])

    async def events(self) -> AsyncGenerator[list[ChatEvent], None]:
        """What every engine step brought, in the neutral form; closing it aborts what still runs."""
        readers: list[Any] = list(self.readers or [PlainFormat() for _ in range(self.run.n)])
        async with aclosing(self.run.deltas()) as deltas:
            async for batch in deltas:
                made: list[ChatEvent] = []
                for choice, delta in batch:
                    made += readers[choice].push(delta)
                    reason = delta.finish_reason
                    if reason is not None:
                        told = self.readers[choice].finish_reason(reason) if self.readers else reason
                        made.append(
                            Finish(
                                index=choice,
                                reason=told,
                                stop_reason=delta.stop_reason,
                                num_prompt_tokens=delta.num_prompt_tokens,
                                num_cached_tokens=delta.num_cached_tokens,
                                num_generated_tokens=self.run.completion_tokens[choice],
                            )
                        )
                yield made

    async def fold(self) -> tuple[MessageFold, Finish]:
        """The whole answer of the first choice."""
        message = MessageFold()
        finish: Finish | None = None
        async with aclosing(self.events()) as events:
            async for batch in events:
                for event in batch:
                    message.add(event)
                    if isinstance(event, Finish):
                        finish = event
        if finish is None:
            raise RuntimeError("a generation ended without a last delta")
        return message, finish


async def start_chat(context: Context, request: ChatCompletionRequest, prefix: str) -> Conversation:
    """Check a chat request, make its prompt and hand it to the engine; ``prefix`` begins the reply's id.

    Raises ``RequestError`` (fields are named as OpenAI names them) and what ``Run`` raises.
    """
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
    frontend = context.frontend
    thinks = asked_thinking(
        request.reasoning_effort, request.thinking_token_budget, frontend.thinking, frontend.template.source
    )
    if thinks.variables:
        given = {**thinks.variables, **(request.chat_template_kwargs or {})}
        request = msgspec.structs.replace(request, chat_template_kwargs=given)
    tools = await tool_plan(context, request)
    params = await structured_outputs(context, request, tools)
    markers_are_special = (tools is not None and tools.shows_specials) or (
        frontend.thinking is not None and frontend.thinking.shows_specials
    )
    sampling = sampling_params(
        context,
        request,
        max_tokens=request.max_completion_tokens or request.max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_logprobs=request.prompt_logprobs,
        structured_outputs=params,
        skip_special_tokens=False if markers_are_special else None,
    )
    prompt = await chat_prompt(context, request, sampling, tools)
    thinking = plan_thinking(
        frontend.thinking,
        prompt[0],
        frontend.tokenizer,
        budget=thinks.budget,
        has_grammar=params is not None,
    )
    request_id = reply_id(prefix, request.request_id)
    watched = None if thinking is None else thinking.engine
    run = Run(context, request, [prompt], request_id=request_id, thinking=watched)
    readers = choice_readers(tools, thinking, run.n, show_reasoning=request.include_reasoning is not False)
    return Conversation(context, request, run, request_id, model, int(time.time()), readers)
