"""Tools for models whose template knows none: the prompt explains them, calls are written as JSON between markers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.api.text.messages import content_text

EXPLANATION = """You can call functions. Each line describes one as JSON:
{tools}
To call a function, answer with its name and arguments in this form, once for each call:
<tool_call>
{{"name": "function name", "arguments": {{"argument": "value"}}}}
</tool_call>"""


def explained(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """The conversation with tools, calls and results written out as text."""
    plain = [_written_out(message) for message in messages]
    if not tools:
        return plain
    lines = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    text = EXPLANATION.format(tools=lines)
    if plain and plain[0].get("role") == "system":
        own = content_text(plain[0].get("content"), "messages[0].content") or ""
        return [{**plain[0], "content": f"{own}\n\n{text}"}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _written_out(message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        return message  # the template room says what is wrong with it
    if message.get("role") == "tool":
        text = content_text(message.get("content"), "messages[].content") or ""
        return {"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls:
        return dict(message)
    parts = [content_text(message.get("content"), "messages[].content") or ""]
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            name = json.dumps(function.get("name"), ensure_ascii=False)
            given = function.get("arguments")
            arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
            parts.append(f'<tool_call>\n{{"name": {name}, "arguments": {arguments or "{}"}}}\n</tool_call>')
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join(part for part in parts if part)}
