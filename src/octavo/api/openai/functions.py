"""``functions`` and ``function_call``, OpenAI's older words for tools: a request in them is answered in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from octavo.api.openai.schema import (
    ChatCompletionRequest,
    ChatDelta,
    ChatMessage,
    FunctionName,
    NamedToolChoice,
    Tool,
)
from octavo.errors import RequestError


def with_tools(request: ChatCompletionRequest) -> ChatCompletionRequest:
    """The same request in today's words; ``functions`` stays, and says how to answer."""
    functions, call = request.functions, request.function_call
    if any(message.get("role") == "function" or "function_call" in message for message in request.messages):
        request = msgspec.structs.replace(request, messages=_messages(request.messages))
    if not functions:
        if isinstance(call, FunctionName):
            raise RequestError("function_call needs functions.", param="function_call")
        return request
    for new, old in (("tools", "functions"), ("tool_choice", "function_call")):
        if getattr(request, new) is not None:
            raise RequestError(f"{new} and {old} exclude each other.", param=old, cure=f"Send {new} only.")
    return msgspec.structs.replace(
        request,
        tools=[Tool(type="function", function=function) for function in functions],
        tool_choice=NamedToolChoice(type="function", function=call)
        if isinstance(call, FunctionName)
        else call,
        parallel_tool_calls=False,  # a message has room for one call
    )


def _messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    last_id = ""
    for place, message in enumerate(messages):
        call = message.get("function_call")
        if isinstance(call, Mapping):
            last_id = f"call_{place}"
            rest = {key: value for key, value in message.items() if key != "function_call"}
            made.append({**rest, "tool_calls": [{"id": last_id, "type": "function", "function": call}]})
        elif message.get("role") == "function":
            made.append({**message, "role": "tool", "tool_call_id": last_id})
        else:
            made.append(message)
    return made


def old_message(message: ChatMessage) -> None:
    """Say the call of a message in the older words."""
    if message.tool_calls:
        message.function_call = message.tool_calls[0].function
        message.tool_calls = msgspec.UNSET


def old_delta(delta: ChatDelta) -> None:
    """Say what a chunk adds to a call in the older words."""
    if delta.tool_calls:
        delta.function_call = delta.tool_calls[0].function
        delta.tool_calls = None


def old_reason(reason: str | None) -> str | None:
    """Why a choice ended, in the older words."""
    return "function_call" if reason == "tool_calls" else reason
