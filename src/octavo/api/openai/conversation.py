"""A chat request on its way: what every dialect starts, and the neutral events it writes in its own words."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field

import msgspec

from octavo.api.chat.effort import asked_thinking
from octavo.api.chat.events import ChatEvent, ChatFormat, Finish, PlainFormat, Text, ToolArgs, ToolStart
from octavo.api.chat.reader import AnswerReader, MessageFold
from octavo.api.chat.thinking import plan_thinking
from octavo.api.chat.tools import ToolPlan
from octavo.api.generation import TextDelta
from octavo.api.openai.context import Context, reply_id
from octavo.api.openai.functions import with_tools
from octavo.api.openai.prompts import chat_ids, chat_prompt, encode_text
from octavo.api.openai.run import Run
from octavo.api.openai.sampling import check_fields, sampling_params, structured_outputs
from octavo.api.openai.schema import ChatCompletionRequest, CompletionTokensDetails, Usage
from octavo.api.openai.tools import choice_readers, tool_plan
from octavo.errors import RequestError
from octavo.protocol.generate import Logprob, SamplingParams


@dataclass(frozen=True)
class Conversation:
    """One chat request that the engine works on. ``readers`` is None where everything is visible text."""

    context: Context
    request: ChatCompletionRequest
    run: Run
    id: str
    model: str
    created: int
    readers: Sequence[AnswerReader] | None
    answer_ids: list[int] = field(default_factory=list)  # of the first choice, as ``events`` goes on

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.run.prompts[0][0])

    def usage(self) -> Usage:
        """Tokens so far, thoughts among them."""
        usage = self.run.usage()
        if self.readers is not None:
            count = sum(reader.num_reasoning_tokens for reader in self.readers)
            usage.completion_tokens_details = CompletionTokensDetails(count)
        return usage

    async def events(self) -> AsyncGenerator[list[ChatEvent], None]:
        """What every engine step brought, in the neutral form; closing it aborts what still runs."""
        readers: Sequence[ChatFormat] = self.readers or [PlainFormat() for _ in range(self.run.n)]
        unplaced: list[list[list[Logprob]]] = [[] for _ in range(self.run.n)]
        async with aclosing(self.run.deltas()) as deltas:
            async for batch in deltas:
                made: list[ChatEvent] = []
                for choice, delta in batch:
                    if not choice:
                        self.answer_ids.extend(delta.token_ids)
                    if self.readers is None or delta.logprobs is None:
                        made += readers[choice].push(delta)
                    else:
                        made += _with_logprobs(self.readers[choice], delta, unplaced[choice])
                    ended = delta.finish_reason
                    if ended is not None:
                        told = self.readers[choice].finish_reason(ended) if self.readers else ended
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


def _with_logprobs(reader: AnswerReader, delta: TextDelta, unplaced: list[list[Logprob]]) -> list[ChatEvent]:
    """The events of a delta, the first text of which has the log probabilities since the last; those of thoughts and calls
    are left out."""
    thoughts = reader.num_reasoning_tokens
    events = reader.push(delta)
    if reader.num_reasoning_tokens == thoughts:
        unplaced += delta.logprobs or []
    for event in events:
        if isinstance(event, Text) and unplaced:
            event.logprobs = unplaced[:]
            unplaced.clear()
        elif isinstance(event, ToolStart | ToolArgs):
            unplaced.clear()
    return events


async def start_chat(
    context: Context,
    request: ChatCompletionRequest,
    prefix: str,
    *,
    before: Sequence[int] = (),
    raw: str | None = None,
) -> Conversation:
    """Check a chat request, make its prompt and hand it to the engine; ``prefix`` begins the reply's id.

    ``before`` are tokens in front of the prompt. ``raw`` is a prompt that takes the place of the messages, and whose
    answer is plain text.

    Raises ``RequestError`` (fields are named as OpenAI names them) and what ``Run`` raises.
    """
    model = context.check_model(request.model)
    drawn = await _prepare(context, request, before, raw)
    request, tools, prompt = drawn.request, drawn.tools, drawn.prompt
    frontend = context.frontend
    thinking = plan_thinking(
        frontend.thinking if raw is None else None,
        prompt[0],
        frontend.tokenizer,
        budget=drawn.budget,
        has_grammar=prompt[1].structured_outputs is not None,
    )
    request_id = reply_id(prefix, request.request_id)
    watched = None if thinking is None else thinking.engine
    run = Run(context, request, [prompt], request_id=request_id, thinking=[watched])
    readers = choice_readers(
        tools,
        thinking,
        run.n,
        show_reasoning=request.include_reasoning is not False,
        harmony=frontend.speaks_harmony and raw is None,
    )
    return Conversation(context, request, run, request_id, model, int(time.time()), readers)


@dataclass(frozen=True)
class _Prepared:
    """A chat request with its prompt; ``budget`` is that of its thoughts."""

    request: ChatCompletionRequest
    tools: ToolPlan | None
    prompt: tuple[list[int], SamplingParams]
    budget: int | None


async def render_chat(context: Context, request: ChatCompletionRequest) -> tuple[list[int], SamplingParams]:
    """The prompt and the parameters of a chat request; nothing is generated."""
    context.check_model(request.model)
    return (await _prepare(context, request, (), None)).prompt


async def _prepare(
    context: Context, request: ChatCompletionRequest, before: Sequence[int], raw: str | None
) -> _Prepared:
    check_fields(request)
    request = with_tools(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs: true.", param="top_logprobs")
    if None not in (request.max_tokens, request.max_completion_tokens) and (
        request.max_tokens != request.max_completion_tokens
    ):
        raise RequestError(
            "max_tokens and max_completion_tokens differ.", param="max_tokens", cure="Send only the second."
        )
    frontend = context.frontend
    template = await context.templates.choose(request.chat_template)
    request, budget = _with_thinking(context, request, template.source)
    tools = await tool_plan(context, request)
    params = await structured_outputs(context, request, tools)
    markers_are_special = (
        frontend.speaks_harmony
        or (tools is not None and tools.shows_specials)
        or (frontend.thinking is not None and frontend.thinking.shows_specials)
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
    if raw is None:
        prompt = await chat_prompt(context, request, sampling, tools, before)
    else:
        ids = [*before, *await encode_text(context, raw, not before)]
        prompt = await frontend.prepare_async(ids, sampling)
    return _Prepared(request, tools, prompt, budget)


async def count_prompt(context: Context, request: ChatCompletionRequest) -> int:
    """How many tokens the prompt of a chat request has; nothing is generated."""
    context.check_model(request.model)
    request, _ = _with_thinking(context, request, context.frontend.template.source)
    return len(await chat_ids(context, request, await tool_plan(context, request)))


def _with_thinking(
    context: Context, request: ChatCompletionRequest, source: str | None
) -> tuple[ChatCompletionRequest, int | None]:
    """The request with the template's own switches for thinking set, and the budget of thoughts."""
    frontend = context.frontend
    asked = asked_thinking(request.reasoning_effort, request.thinking_token_budget, frontend.thinking, source)
    if asked.variables:
        given = {**asked.variables, **(request.chat_template_kwargs or {})}
        request = msgspec.structs.replace(request, chat_template_kwargs=given)
    return request, asked.budget


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Errors inside name fields as another dialect does: ``names`` maps OpenAI's to that dialect's."""
    try:
        yield
    except RequestError as error:
        name = names.get(error.param or "")
        if name is None or error.param is None:
            raise
        cause = error.cause.replace(error.param, name)
        raise RequestError(cause, name, error.cure) from None
