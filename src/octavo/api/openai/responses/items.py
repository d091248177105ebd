"""Input items as messages, and a request of ``/v1/responses`` as a chat request."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import UnsetType

from octavo.api.openai.responses.schema import (
    FunctionCallItem,
    InputTokensRequest,
    OutputItem,
    OutputMessage,
    ReasoningItem,
    ResponsesRequest,
    TextFormat,
    ToolChoice,
)
from octavo.api.openai.schema import (
    ChatCompletionRequest,
    FunctionDefinition,
    FunctionName,
    JsonSchemaFormat,
    NamedToolChoice,
    ResponseFormat,
    Tool,
    ToolName,
)
from octavo.errors import RequestError

# Names of fields in errors: ours to theirs.
NAMES = {"max_tokens": "max_output_tokens", "response_format": "text.format", "messages": "input"}
COPIED = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "logit_bias", "seed", "stop", "ignore_eos", "include_stop_str_in_output"),
    "skip_special_tokens",
    *("priority", "cache_salt", "request_id", "structured_outputs", "thinking_token_budget"),
    *("chat_template_kwargs", "stream", "user"),
)
LOGPROBS = "message.output_text.logprobs"  # of ``include``
T = TypeVar("T", bound=msgspec.Struct)


class InputMessage(msgspec.Struct, kw_only=True):
    """A message; its content is checked with all others'."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Any


class CallItem(msgspec.Struct, kw_only=True):
    """A call that the model made."""

    call_id: str
    name: ToolName
    arguments: str


class CallOutputItem(msgspec.Struct, kw_only=True):
    """What a call returned."""

    call_id: str
    output: Any


class Thought(msgspec.Struct, kw_only=True):
    """A piece of reasoning."""

    text: str


class ThoughtItem(msgspec.Struct, kw_only=True):
    """Reasoning of an earlier response."""

    content: list[Thought] | None = None
    summary: list[Thought] = []


def chat_request(
    body: InputTokensRequest, earlier: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
) -> ChatCompletionRequest:
    """The request in the form all dialects share; ``earlier`` and ``now`` are turns."""
    turns = merged([*earlier, *now])
    if body.instructions:
        turns.insert(0, {"role": "system", "content": body.instructions})
    chat = ChatCompletionRequest(
        model=body.model, messages=turns, parallel_tool_calls=body.parallel_tool_calls
    )
    _tools(body, chat)
    if body.reasoning is not None:
        chat.reasoning_effort = body.reasoning.effort
    if body.text is not None and body.text.format is not None:
        chat.response_format = _format(body.text.format)
    if isinstance(body, ResponsesRequest):
        for name in COPIED:
            setattr(chat, name, getattr(body, name))
        chat.max_completion_tokens = body.max_output_tokens
        if body.top_logprobs or LOGPROBS in (body.include or ()):
            chat.logprobs, chat.top_logprobs = True, body.top_logprobs
    return chat


def _tools(body: InputTokensRequest, chat: ChatCompletionRequest) -> None:
    choice, tools = body.tool_choice, body.tools or []
    if isinstance(choice, ToolChoice):
        if choice.type == "function":
            if isinstance(choice.name, UnsetType):
                raise RequestError("tool_choice.name is missing.", param="tool_choice.name")
            chat.tool_choice = NamedToolChoice(type="function", function=FunctionName(name=choice.name))
        else:
            allowed = [] if isinstance(choice.tools, UnsetType) else [tool.name for tool in choice.tools]
            unknown = set(allowed) - {tool.name for tool in tools}
            if unknown or not allowed:
                raise RequestError(
                    f"tool_choice.tools must name tools of the request, not {sorted(unknown)}.",
                    param="tool_choice.tools",
                )
            tools = [tool for tool in tools if tool.name in allowed]
            chat.tool_choice = "auto" if isinstance(choice.mode, UnsetType) else choice.mode
    else:
        chat.tool_choice = choice
    chat.tools = [
        Tool(
            type="function",
            function=FunctionDefinition(
                name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
            ),
        )
        for tool in tools
    ] or None


def _format(asked: TextFormat) -> ResponseFormat:
    if asked.type != "json_schema":
        return ResponseFormat(type=asked.type)
    if isinstance(asked.schema, UnsetType):
        raise RequestError("text.format.schema is missing.", param="text.format.schema")
    return ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(schema=asked.schema))


def input_items(given: str | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The input as items with ids, as it can be asked for later."""
    if given is None:
        return []
    if isinstance(given, str):
        given = [{"role": "user", "content": [{"type": "input_text", "text": given}]}]
    return [{"type": "message", "id": new_id("item"), **item} for item in given]


def turns_of(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Items as turns; ``RequestError`` names the item that cannot be one."""
    return [_turn(item, f"input[{i}]") for i, item in enumerate(items)]


def _turn(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = item.get("type", "message")
    if kind == "message":
        message = convert(item, InputMessage, where)
        role = "system" if message.role == "developer" else message.role
        return {"role": role, "content": message.content}
    if kind == "function_call":
        call = convert(item, CallItem, where)
        function = {"name": call.name, "arguments": call.arguments}
        calls = [{"id": call.call_id, "type": "function", "function": function}]
        return {"role": "assistant", "content": None, "tool_calls": calls}
    if kind == "function_call_output":
        made = convert(item, CallOutputItem, where)
        return {"role": "tool", "tool_call_id": made.call_id, "content": made.output}
    if kind == "reasoning":
        thought = convert(item, ThoughtItem, where)
        text = "\n".join(part.text for part in thought.content or thought.summary)
        return {"role": "assistant", "content": None, "reasoning_content": text}
    raise RequestError(
        f"{where}.type is {kind!r}, which is not served here.",
        param=f"{where}.type",
        cure="Send messages, function calls, their outputs and reasoning.",
    )


def convert(item: Mapping[str, Any], kind: type[T], where: str) -> T:
    """``item`` as ``kind``; ``RequestError`` names the field."""
    try:
        return msgspec.convert(item, kind)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        name = f"{where}{path.rstrip('`')}"
        raise RequestError(f"{name}: {text}.", param=name) from None


def output_turns(output: Sequence[OutputItem]) -> list[dict[str, Any]]:
    """A response's own items as turns of the next request."""
    turns: list[dict[str, Any]] = []
    for item in output:
        if isinstance(item, OutputMessage):
            text = "".join(part.text for part in item.content)
            turns.append({"role": "assistant", "content": text})
        elif isinstance(item, ReasoningItem):
            text = "".join(part.text for part in item.content)
            turns.append({"role": "assistant", "content": None, "reasoning_content": text})
        elif isinstance(item, FunctionCallItem):
            function = {"name": item.name, "arguments": item.arguments}
            calls = [{"id": item.call_id, "type": "function", "function": function}]
            turns.append({"role": "assistant", "content": None, "tool_calls": calls})
    return turns


def merged(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring items of one answer (thoughts, text, calls) as one message of the assistant."""
    made: list[dict[str, Any]] = []
    for turn in turns:
        last = made[-1] if made else None
        if last is None or turn["role"] != "assistant" or last["role"] != "assistant":
            made.append(dict(turn))
            continue
        if turn.get("content") is not None:
            if last.get("content") is not None:  # two messages stay two
                made.append(dict(turn))
                continue
            last["content"] = turn["content"]
        if "reasoning_content" in turn:
            last["reasoning_content"] = turn["reasoning_content"]
        if "tool_calls" in turn:
            last["tool_calls"] = [*last.get("tool_calls", []), *turn["tool_calls"]]
    return made


def new_id(kind: str) -> str:
    """A random id like ``msg_...``."""
    return f"{kind}_{uuid.uuid4().hex}"
