"""Tools and thoughts in OpenAI's words: from the request's fields to a plan, from events to messages and chunks."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.api.chat.events import ChatEvent, Reasoning, Text, ToolArgs, ToolStart
from octavo.api.chat.formats.harmony import HarmonyReader
from octavo.api.chat.formats.tools import ToolParser
from octavo.api.chat.reader import AnswerReader, ChoiceReader, MessageFold
from octavo.api.chat.thinking import ThinkingPlan
from octavo.api.chat.tools import ToolDefinition, ToolPlan, plan_tools
from octavo.api.openai.context import Context
from octavo.api.openai.schema import (
    ChatCompletionRequest,
    ChatDelta,
    ChatMessage,
    FunctionCall,
    NamedToolChoice,
    ToolCall,
    ToolCallDelta,
)


async def tool_plan(context: Context, request: ChatCompletionRequest) -> ToolPlan | None:
    """What the request's tools ask for; None where none may be called."""
    choice = request.tool_choice
    named = choice.function.name if isinstance(choice, NamedToolChoice) else None
    tools = [
        ToolDefinition(
            tool.function.name,
            tool.function.description,
            tool.function.parameters,
            bool(tool.function.strict),
        )
        for tool in request.tools or []
    ]
    frontend = context.frontend
    return await plan_tools(
        tools,
        "auto" if choice is None or isinstance(choice, NamedToolChoice) else choice,
        named,
        parallel=request.parallel_tool_calls is not False,
        syntax=frontend.tool_syntax,
        tokenizer=frontend.tokenizer,
    )


def choice_readers(
    tools: ToolPlan | None,
    thinking: ThinkingPlan | None,
    n: int,
    *,
    show_reasoning: bool,
    harmony: bool = False,
) -> Sequence[AnswerReader] | None:
    """A reader for each choice; None where all text is the answer."""
    if harmony:
        parallel = tools is None or tools.parallel
        return [HarmonyReader(index, parallel=parallel, show_reasoning=show_reasoning) for index in range(n)]
    if tools is None and (thinking is None or thinking.prompt.closed):
        return None
    return [
        ChoiceReader(
            index,
            reasoning=None if thinking is None else thinking.parser(index),
            tools=None
            if tools is None
            else ToolParser(
                tools.syntax, index, names=tools.names, schemas=tools.schemas, parallel=tools.parallel
            ),
            show_reasoning=show_reasoning,
        )
        for index in range(n)
    ]


def chat_message(fold: MessageFold) -> ChatMessage:
    """The whole message of a choice."""
    message = ChatMessage(content=fold.text or (None if fold.calls or fold.reasoning else ""))
    if fold.reasoning:
        message.reasoning = message.reasoning_content = fold.reasoning
    if fold.calls:
        message.tool_calls = [
            ToolCall(id=call.id, function=FunctionCall(call.name, "".join(parts)))
            for call, parts in zip(fold.calls, fold.arguments)
        ]
    return message


def chat_deltas(events: list[ChatEvent]) -> list[ChatDelta]:
    """What each event adds to the message."""
    deltas = []
    for event in events:
        if isinstance(event, Text):
            deltas.append(ChatDelta(content=event.text))
        elif isinstance(event, Reasoning):
            deltas.append(ChatDelta(reasoning=event.text, reasoning_content=event.text))
        elif isinstance(event, ToolStart):
            call = ToolCallDelta(
                index=event.tool, id=event.id, type="function", function=FunctionCall(event.name, "")
            )
            deltas.append(ChatDelta(tool_calls=[call]))
        elif isinstance(event, ToolArgs):
            call = ToolCallDelta(index=event.tool, function=FunctionCall(arguments=event.text))
            deltas.append(ChatDelta(tool_calls=[call]))
    return deltas
