"""Which family's format a model speaks: read from its chat template, then proved on it.

A row fits where its mark stands in the template. The proof renders a conversation with a call and reads it back; a
template that prints calls in another way than its row expects is served with the generic format.
"""

from __future__ import annotations

from octavo.api.chat.events import ToolArgs, ToolStart
from octavo.api.chat.formats.tools import ToolParser, ToolSyntax
from octavo.api.text.template import ChatTemplate
from octavo.errors import RequestError

HERMES = ToolSyntax("hermes", "<tool_call>", "</tool_call>")
LLAMA3_JSON = ToolSyntax("llama3_json", "<|python_tag|>", args_key="parameters", bare=True, separator="; ")
MISTRAL = ToolSyntax("mistral", "[TOOL_CALLS]", is_list=True, separator=", ", id_length=9)
MISTRAL_NAMED = ToolSyntax("mistral_named", "[TOOL_CALLS]", args_mark="[ARGS]", separator="", id_length=9)
# For models whose template knows nothing of tools (or writes calls in a way not known here): the prompt explains it.
GENERIC = ToolSyntax("json", "<tool_call>", "</tool_call>")

# Marks that must (and must not) stand in the template; the first row that fits and is proved wins.
ROWS: tuple[tuple[ToolSyntax, tuple[str, ...], tuple[str, ...]], ...] = (
    (MISTRAL_NAMED, ("[TOOL_CALLS]", "[ARGS]"), ()),
    (MISTRAL, ("[TOOL_CALLS]",), ("[ARGS]",)),
    (HERMES, ("<tool_call>", "</tool_call>"), ("<function=", "<arg_key>")),
    (LLAMA3_JSON, ("tools", '"parameters"'), ("<tool_call>",)),
    (LLAMA3_JSON, ("tools", "<|python_tag|>"), ("<tool_call>",)),
)
_PROBE = "octavo_probe"


def detect_tools(template: ChatTemplate) -> ToolSyntax:
    """The format in which this template's model calls tools."""
    source = template.source
    if source is None or "tools" not in source:
        return GENERIC
    for syntax, marks, others in ROWS:
        fits = all(mark in source for mark in marks) and not any(mark in source for mark in others)
        if fits and _reads_back(template, syntax):
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
    at = text.rfind(syntax.begin)
    if at < 0 and syntax.bare:
        at = max(text.rfind('{"name"'), text.rfind('{"function"'))
    if at < 0:
        return False
    parser = ToolParser(syntax, 0, names=[_PROBE])
    events = [*parser.push(text[at:]), *parser.finish()]
    names = [event.name for event in events if isinstance(event, ToolStart)]
    args = "".join(event.text for event in events if isinstance(event, ToolArgs))
    return names == [_PROBE] and "".join(args.split()) == '{"x":1}'
