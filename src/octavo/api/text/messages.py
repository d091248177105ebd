"""Messages as clients send them (OpenAI's form) to messages as chat templates read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from octavo.errors import RequestError

_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Check every message and reduce its content to text; other keys are left to the template.

    Raises ``RequestError`` that names the message, key or part at fault.
    """
    if not messages:
        raise RequestError("messages must hold at least one message.", param="messages")
    return [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _plain(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object with role and content.", param=where)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{where}.role must be a string.", param=f"{where}.role")
    text = content_text(message.get("content"), f"{where}.content")
    calls = message.get("tool_calls")
    if text is None and not calls and role != "assistant":
        raise RequestError(f"{where}.content is missing.", param=f"{where}.content")
    # Only what was given, so that "is defined" in a template means what it says.
    plain = {key: value for key, value in message.items() if value is not None}
    plain["content"] = "" if text is None else text
    if calls is not None:
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            raise RequestError(f"{where}.tool_calls must be a list of objects.", param=f"{where}.tool_calls")
        plain["tool_calls"] = [_arguments_read(call) for call in calls]
    return plain


def content_text(content: object, where: str) -> str | None:
    """The text of a message's content; text parts are joined by a newline. ``where`` names it in errors."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or a list of parts.", param=where)
    texts = []
    for i, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        here = f"{where}[{i}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or kind not in _TEXT_PARTS:
            raise RequestError(
                f"{here}.type is {kind!r}; only text is supported here.",
                param=f"{here}.type",
                cure='Send parts of {"type": "text"}.',
            )
        text = part.get("text")
        if not isinstance(text, str):
            raise RequestError(f"{here}.text must be a string.", param=f"{here}.text")
        texts.append(text)
    return "\n".join(texts)


def _arguments_read(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Tool call arguments arrive as JSON text; templates want the object (they print it themselves)."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(arguments := function.get("arguments"), str):
        return call
    try:
        read = msgspec.json.decode(arguments) if arguments else {}
    except msgspec.DecodeError:
        return call
    return {**call, "function": {**function, "arguments": read}}


def conversation_chars(messages: Sequence[Mapping[str, Any]]) -> int:
    """About how long a conversation is, without rendering it."""
    count = 0
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, list) else [{"text": content}]
        for part in parts:
            text = part.get("text") if isinstance(part, Mapping) else part
            count += len(text) if isinstance(text, str) else 0
    return count
