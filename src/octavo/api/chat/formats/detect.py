"""Which family's format a model speaks: read from its chat template, then proved on it.

A row fits where its mark stands in the template. The proof renders a conversation with a call and reads it back; a
template that prints calls in another way than its row expects is served with the generic format.
"""

from __future__ import annotations

from octavo.api.chat.events import ChatEvent, ToolArgs, ToolStart
from octavo.api.chat.formats.families import GENERIC, HARMONY, ROWS, UNPROVED
from octavo.api.chat.formats.harmony import HarmonyReader, speaks_harmony
from octavo.api.chat.formats.tools import ToolParser, ToolSyntax
from octavo.api.generation import TextDelta
from octavo.api.text.template import ChatTemplate
from octavo.errors import RequestError

_PROBE = "octavo_probe"


def detect_tools(template: ChatTemplate) -> ToolSyntax:
    """The format in which this template's model calls tools."""
    source = template.source
    if source is None or "tools" not in source:
        return GENERIC
    if speaks_harmony(source):
        return HARMONY
    for syntax, marks, others in ROWS:
        fits = all(mark in source for mark in marks) and not any(mark in source for mark in others)
        if fits and (syntax in UNPROVED or _reads_back(template, syntax)):
            return syntax
    return GENERIC


def _reads_back(template: ChatTemplate, syntax: ToolSyntax) -> bool:
    call_id = "probe0000"[: syntax.id_length or 9]
    call = {"id": call_id, "type": "function", "function": {"name": _PROBE, "arguments": '{"x": 1}'}}
    messages: list[dict[str, object]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    tool = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": {}}}
    try:
        text = template.render(messages, add_generation_prompt=False, tools=[tool])
    except RequestError:
        return True  # it refuses such a conversation, which says nothing about the format
    name, args = read_last_call(text, syntax, _PROBE)
    return name == _PROBE and "".join(args.split()) == '{"x":1}'


def read_last_call(text: str, syntax: ToolSyntax, name: str) -> tuple[str | None, str]:
    """Name and arguments of the last call in a rendered conversation, as this format reads it; ``name`` is looked for."""
    at = text.rfind(syntax.begin)
    if at < 0 and syntax.bare == "{":
        at = max(text.rfind('{"name"'), text.rfind('{"function"'))
    elif at < 0 and syntax.bare:
        at = text.rfind(f"[{name}(")
    if at < 0:
        return None, ""
    events: list[ChatEvent]
    if syntax is HARMONY:
        events = HarmonyReader(0).push(TextDelta(text[at:], [], "stop"))
    else:
        parser = ToolParser(syntax, 0, names=[name])
        events = [*parser.push(text[at:]), *parser.finish()]
    names = [event.name for event in events if isinstance(event, ToolStart)]
    args = "".join(event.text for event in events if isinstance(event, ToolArgs))
    return (names[0] if names else None), args
