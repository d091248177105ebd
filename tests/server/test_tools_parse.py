"""Tool calls found in text: one case a format, random cuts, hostile text, and the formats read from templates."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.api.chat.events import ChatEvent, Text, ToolArgs, ToolStart
from octavo.api.chat.formats.detect import detect_tools
from octavo.api.chat.formats.families import GENERIC, HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_NAMED
from octavo.api.chat.formats.tools import ToolParser, ToolSyntax, new_call_id
from octavo.api.text.template import ChatTemplate

Part = tuple[Any, ...]
FORMATS = [HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_NAMED, GENERIC]


def read(syntax: ToolSyntax, pieces: list[str], **options: Any) -> list[Part]:
    """What a parser makes of the pieces, neighbours joined: ("text", ...) and ("call", number, name, arguments)."""
    numbers = itertools.count()
    parser = ToolParser(syntax, 0, names=["f", "g"], new_id=lambda _: str(next(numbers)), **options)
    events: list[ChatEvent] = []
    for piece in pieces:
        events += parser.push(piece)
    events += parser.finish()
    assert parser.push("") == []
    parts: list[list[Any]] = []
    for event in events:
        if isinstance(event, Text):
            if parts and parts[-1][0] == "text":
                parts[-1][1] += event.text
            else:
                parts.append(["text", event.text])
        elif isinstance(event, ToolStart):
            parts.append(["call", event.tool, event.name, ""])
        else:
            assert isinstance(event, ToolArgs) and parts[-1][1] == event.tool
            parts[-1][3] += event.text
    return [tuple(part) for part in parts]


CASES: list[tuple[ToolSyntax, str, list[Part]]] = [
    (HERMES, "  plain \n", [("text", "  plain \n")]),
    (HERMES, "1 < 2 <tool", [("text", "1 < 2 <tool")]),
    (
        HERMES,
        'Sure.\n<tool_call>\n{"name": "f", "arguments": {"a": "x}</tool_call>", "b": [1, {"c": null}]}}\n</tool_call>\n<tool_call>\n{"name": "g"}\n</tool_call>\nBye. ',
        [
            ("text", "Sure."),
            ("call", 0, "f", '{"a": "x}</tool_call>", "b": [1, {"c": null}]}'),
            ("call", 1, "g", "{}"),
            ("text", "Bye."),
        ],
    ),
    (
        HERMES,
        '<tool_call>{"arguments": {"q": 1}, "id": 7, "name": "h"}</tool_call>',
        [("call", 0, "h", '{"q": 1}')],
    ),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"q\\": 1}"}', [("call", 0, "f", '{"q": 1}')]),
    (HERMES, '<tool_call>{"name": "f", "arguments": null}}}</tool_call>', [("call", 0, "f", "{}")]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": [1', [("call", 0, "f", '{"a": [1')]),
    (HERMES, 'a <tool_call>\n{"name": "f', [("text", 'a <tool_call>\n{"name": "f')]),
    (HERMES, "<tool_call>nonsense</tool_call>", [("text", "<tool_call>nonsense</tool_call>")]),
    (HERMES, '<tool_call>{"name": 5}</tool_call>', [("text", '<tool_call>{"name": 5}</tool_call>')]),
    (HERMES, "<tool_call></tool_call>", [("text", "<tool_call></tool_call>")]),
    (
        LLAMA3_JSON,
        '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
        [("call", 0, "f", '{"a": 1}'), ("call", 1, "g", "{}")],
    ),
    (LLAMA3_JSON, '{"city": "Paris"}', [("text", '{"city": "Paris"}')]),
    (LLAMA3_JSON, ' {"name": "Paris", "x": {}} ', [("text", ' {"name": "Paris", "x": {}} ')]),
    (LLAMA3_JSON, 'No {"name": "f", "parameters": {}}', [("text", 'No {"name": "f", "parameters": {}}')]),
    (
        LLAMA3_JSON,
        '<|python_tag|>{"type": "function", "name": "h", "parameters": {}}',
        [("call", 0, "h", "{}")],
    ),
    (
        MISTRAL,
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": "]"}}, {"name": "g", "arguments": {}}]',
        [("call", 0, "f", '{"a": "]"}'), ("call", 1, "g", "{}")],
    ),
    (
        MISTRAL_NAMED,
        'Ok [TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}',
        [("text", "Ok"), ("call", 0, "f", '{"a": 1}'), ("call", 1, "g", "{}")],
    ),
    (MISTRAL_NAMED, "[TOOL_CALLS]" + "x" * 300, [("text", "[TOOL_CALLS]" + "x" * 300)]),
]


@pytest.mark.parametrize(("syntax", "text", "parts"), CASES, ids=range(len(CASES)))
def test_formats(syntax: ToolSyntax, text: str, parts: list[Part]) -> None:
    assert read(syntax, [text]) == parts
    assert read(syntax, list(text)) == parts


def test_only_the_first_call_where_one_is_wanted() -> None:
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>{"name": "g"}</tool_call>'
    assert read(HERMES, [text], parallel=False) == [("call", 0, "f", "{}")]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
calls = st.lists(
    st.tuples(st.sampled_from(["f", "g"]), st.dictionaries(st.text(max_size=6), values, max_size=3)),
    max_size=3,
)


def write(syntax: ToolSyntax, made: list[tuple[str, dict[str, Any]]], escape: bool) -> str:
    """Calls as a well-behaved model writes them."""
    objects = [json.dumps({"name": name, syntax.args_key: args}, ensure_ascii=escape) for name, args in made]
    if not made:
        return ""
    if syntax.end:
        return "\n".join(f"{syntax.begin}\n{text}\n{syntax.end}" for text in objects)
    if syntax.args_mark:
        return "".join(f"{syntax.begin}{name}{syntax.args_mark}{json.dumps(args)}" for name, args in made)
    return f"{syntax.begin}[{', '.join(objects)}]" if syntax.is_list else "; ".join(objects)


def cut(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@given(
    syntax=st.sampled_from(FORMATS),
    made=calls,
    escape=st.booleans(),
    places=st.lists(st.integers(0, 999), max_size=12),
)
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_read_however_it_is_cut(
    syntax: ToolSyntax, made: list[tuple[str, dict[str, Any]]], escape: bool, places: list[int]
) -> None:
    text = write(syntax, made, escape)
    found = read(syntax, cut(text, places))
    assert [(part[2], json.loads(part[3])) for part in found] == made
    assert found == read(syntax, [text])


FRAGMENTS = """<tool_call> </tool_call> <|python_tag|> [TOOL_CALLS] [ARGS] { } [ ] " \\ : , ; "name" "arguments" "f" f null 1
é {"name":"f","arguments":{ {"name":"f" < <tool __import__('os').system('true')"""
fragments = st.lists(st.sampled_from([*FRAGMENTS.split(), " ", "\n"]), max_size=14)


@given(syntax=st.sampled_from(FORMATS), parts=fragments, places=st.lists(st.integers(0, 999), max_size=10))
@settings(max_examples=600, deadline=None)
def test_any_text_gives_the_same_however_it_is_cut(
    syntax: ToolSyntax, parts: list[str], places: list[int]
) -> None:
    text = "".join(parts)
    whole = read(syntax, [text])
    assert read(syntax, cut(text, places)) == whole
    assert read(syntax, list(text)) == whole
    if all(part[0] == "text" for part in whole):
        assert "".join(part[1] for part in whole) == text  # nothing is lost where there was no call


HOSTILE = [
    '<tool_call>{"name":"f"}' + '{"name":"f"}' * 20_000,
    "[TOOL_CALLS]x" * 20_000,
    "[TOOL_CALLS]" + "[" * 250_000,
    "<tool_call>" * 25_000,
    "<" * 250_000,
    " " * 250_000 + "x",
    "{" * 250_000,
    '<tool_call>{"name":"f","arguments":{"a":"' + '\\"' * 125_000,
    '<tool_call>{"' + "x" * 250_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_much_hostile_text_takes_linear_time(text: str) -> None:
    """CVE-2025-48887 and kin: a second or two of processor time, where a quadratic reader needs hours."""
    for syntax in (HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_NAMED):
        begin = time.process_time()
        read(syntax, [text])
        assert time.process_time() - begin < 5


QWEN = """{%- if tools %}{{ '<|im_start|>system\\n# Tools\\n<tools>' }}{% for t in tools %}{{ t | tojson }}{% endfor %}
{{ '</tools> use <tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% for c in m.tool_calls %}
{{- '\\n<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' + (c.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"""
LLAMA = """{% if tools %}{{ 'Respond in the format {"name": function name, "parameters": dictionary}' }}{% endif %}
{% for m in messages %}{% if m.tool_calls %}{{ '{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}
{{- m.tool_calls[0].function.arguments | tojson }}{{ '}' }}{% else %}{{ m.content }}{% endif %}{% endfor %}"""
MISTRAL_V3 = """{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}
{%- if m.tool_calls %}{% if m.tool_calls[0].id | length != 9 %}{{ raise_exception('id') }}{% endif %}[TOOL_CALLS][
{%- for c in m.tool_calls %}{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}{% endfor %}]
{%- else %}{{ m.content }}{% endif %}{% endfor %}"""
MISTRAL_V11 = """{% if tools %}{{ tools }}{% endif %}{% for m in messages %}{% for c in m.tool_calls %}
{{- '[TOOL_CALLS]' + c.function.name + '[ARGS]' + (c.function.arguments | tojson) }}{% endfor %}{% endfor %}"""
CODER = QWEN.replace("<function-name>", "<function=x>")
UNKNOWN = "{% if tools %}{{ tools }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
LIAR = QWEN.replace('"arguments": \' +', '"arguments" ~ \' +')  # names the markers, but writes no such calls


@pytest.mark.parametrize(
    ("source", "syntax"),
    [
        (QWEN, HERMES),
        (LLAMA, LLAMA3_JSON),
        (MISTRAL_V3, MISTRAL),
        (MISTRAL_V11, MISTRAL_NAMED),
        (CODER, GENERIC),
        (UNKNOWN, GENERIC),
        (LIAR, GENERIC),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", GENERIC),
        (None, GENERIC),
    ],
)
def test_the_format_is_read_from_the_template(source: str | None, syntax: ToolSyntax) -> None:
    assert detect_tools(ChatTemplate(source)) is syntax


def test_call_ids() -> None:
    assert len(new_call_id(MISTRAL)) == 9 and new_call_id(MISTRAL).isalnum()
    assert new_call_id(HERMES).startswith("call_") and new_call_id(HERMES) != new_call_id(HERMES)
