"""Chat templates: the same text as Hugging Face's renderer, and nothing a hostile template can do."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from octavo.api.text import template_sandbox
from octavo.api.text.template import RESERVED, ChatTemplate
from octavo.errors import ModelFileError, RequestError

SPECIALS = {"bos_token": "<bos>", "eos_token": "<eos>"}
USER = [{"role": "user", "content": "hi"}]
CHAT = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "What is 2+2?  "},
    {"role": "assistant", "content": "4 — vier"},
    {"role": "user", "content": "  And 3+3?\n"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds <a> & 'b' größer",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
        },
    }
]

# The template in SmolLM2-135M-Instruct's GGUF file.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Gemma's turns: the system message goes before the first user's, the assistant is "model", roles must alternate.
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Roles must alternate user/assistant") }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}
"""
CONSTRUCTS = """{% set ns = namespace(count=0, last='') %}
{% macro show(message, mark='#') %}
  {{ mark }}{{ message.role | upper }}: {{ message['content'] | trim }}
{% endmacro %}
{% if tools %}
Tools: {{ tools | tojson }}
{% for tool in tools %}
{{ tool.function | tojson(indent=2) }} {{ tool['function'].parameters.properties.items() | list | length }}
{% endfor %}
{% endif %}
{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {% set ns.count = ns.count + 1 %}
    {{ show(message, mark='>' * ns.count) }}
    {%- generation %}[{{ message.content ~ '|' ~ loop.index ~ '/' ~ loop.length }}]{% endgeneration %}
    {% if loop.last %}{% set ns.last = message.role %}{% break %}{% endif %}
{% endfor %}
{% filter upper %}shout {{ ns.last }}{% endfilter %}
{% set block %}  x{{ ns.count }} {% endset %}
{{ block | trim }} {{ missing is defined }} {{ enable_thinking | default('unset') }} {{ 7 // 2 }} {{ 2 ** 5 }}
{{ messages | map(attribute='role') | join(',') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ 'a,b'.split(',') }} {{ 'abc'[::-1] }} {{ "%s-%03d" | format('x', 7) }} {{ '{}:{:>4}'.format(1, 2) }}
{{ dict(a=1) | tojson }} {{ {'k': '</script>é'} | tojson }} {{ range(3) | list }} {{ none }} {{ eos_token }}
{%- for a in [1, 2] recursive %}{{ a }}{% else %}none{% endfor %}
{% macro wrap(tag) %}<{{ tag }}>{{ caller() }}</{{ tag }}>{% endmacro %}
{% call wrap('b') %}{{ 'bold' | title }}{% endcall %}
{# a comment #}
{{ [1, 2, 3] | sum }} {{ [{'a': 2}, {'a': 3}] | sum(attribute='a') }} {{ 'a-b' | replace('-', '+') }}
{{ 'x\ny' | indent(2) }} {{ 'a b c' | wordwrap(3) }} {{ ['p'] + [loop_messages, ('t', 1)] }} {{ messages[0].keys() | list }}
{{ (messages | last).content is string }}{{ '\\n'.join(['p', 'q']) }}{{ messages | length > 1 and not tools }}
"""


def theirs(source: str, messages: list[dict[str, Any]], tools: Any = None, **kwargs: Any) -> str:
    rendered, _ = render_jinja_template([messages], chat_template=source, tools=tools, **kwargs, **SPECIALS)
    return str(rendered[0])


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("source", [SMOLLM2, GEMMA, CONSTRUCTS], ids=["smollm2", "gemma", "constructs"])
def test_equals_hugging_face(source: str, tools: Any, prompt: bool) -> None:
    expected = theirs(source, CHAT, tools, add_generation_prompt=prompt)
    template = ChatTemplate(source, SPECIALS)
    assert template.render(CHAT, tools=tools, add_generation_prompt=prompt) == expected
    assert (
        template.render(CHAT, tools=tools, add_generation_prompt=prompt) == expected
    )  # compiled once, used twice
    assert len(expected) > 50


def test_kwargs_reach_the_template() -> None:
    template = ChatTemplate("{{ enable_thinking }}{{ documents | length }}")
    assert template.render(USER, kwargs={"enable_thinking": False}, documents=[{}]) == "False1"


def test_strftime_now() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(USER) == datetime.now().strftime("%Y")


def test_the_templates_own_refusal_is_the_clients_error() -> None:
    with pytest.raises(RequestError, match="Roles must alternate") as caught:
        ChatTemplate(GEMMA, SPECIALS).render([{"role": "assistant", "content": "x"}])
    assert caught.value.param == "messages"
    assert caught.value.status == 400


def test_a_model_without_template_names_the_cure() -> None:
    with pytest.raises(RequestError, match="--chat-template FILE"):
        ChatTemplate(None).render(USER)


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% unknown %}", "{% include 'x' %}{% endif %}"])
def test_a_broken_template_is_the_models_error(source: str) -> None:
    with pytest.raises(ModelFileError, match="chat template"):
        ChatTemplate(source)


def test_a_huge_source_is_refused() -> None:
    with pytest.raises(ModelFileError, match="characters"):
        ChatTemplate("x" * (template_sandbox.MAX_SOURCE_CHARS + 1))


@pytest.mark.parametrize("name", [*sorted(RESERVED), "_budget", "__class__"])
def test_kwargs_may_not_replace_the_conversation(name: str) -> None:
    with pytest.raises(RequestError, match=f"'{name}'") as caught:
        ChatTemplate(SMOLLM2).render(USER, kwargs={name: []})
    assert caught.value.param == "chat_template_kwargs"


# Ways out of a template engine that have been used against servers like this one.
INJECTIONS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ ''|attr('__cl' ~ 'ass__')|attr('__base__') }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['__builtins__'] }}",
    "{{ strftime_now.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ ['{0.__class__}'] | map('format', 1) | list }}{{ ''.__class__ }}",
    "{{ ('{0.__class__}'.format)('') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages.pop() }}",
    "{{ messages.clear() }}",
    "{% set messages[0].x = 1 %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends '/etc/passwd' %}",
    "{{ get_flashed_messages.__globals__ }}",
    "{{ request.application.__globals__ }}",
    "{{ config.items() }}",
    "{{ [].append.__self__.__class__ }}",
    "{{ (1).__class__.__base__ }}",
    "{{ dict.mro() }}",
    "{{ range.__class__ }}",
    "{{ messages | map(attribute='__class__') | list }}{{ (messages | map(attribute='__class__') | first).x() }}",
    "{{ messages | sum(attribute='__class__') }}",
    "{{ _budget._steps }}",
    "{{ _budget.__class__ }}",
    "{% macro f() %}{{ caller.__globals__ }}{% endmacro %}{{ f() }}{{ f.__globals__ }}",
    "{{ ''.join.__self__.__class__ }}",
    "{{ x.__class__ }}",
]


@pytest.mark.parametrize("source", INJECTIONS)
def test_no_way_out_of_the_sandbox(source: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    try:
        text = ChatTemplate(source, SPECIALS).render(messages)
    except (RequestError, ModelFileError):
        text = ""
    for leak in (
        "<class",
        "<built-in",
        "<function",
        "__builtins__",
        "root:",
        "uid=",
        "<module",
        "<code",
        "Environment",
    ):
        assert leak not in text
    assert messages == [{"role": "user", "content": "hi"}]


# Each would take hours or all memory; each must be stopped by its own rule.
BOMBS = {
    "nested loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "steps",
    ),
    "large range": ("{{ range(10**9) | list }}", "argument"),
    "loop over a large range": ("{% for i in range(999999) %}{% endfor %}", "Range too big"),
    "multiplied text": ("{{ 'x' * 1000000000 }}", "multiplies"),
    "multiplied list": ("{{ 999999999 * [0] }}", "multiplies"),
    "doubled text": (
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "value of more",
    ),
    "added text": (
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "value of more",
    ),
    "squared number": (
        "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "number of more",
    ),
    "power": ("{{ 9 ** 99999 }}", "number of more"),
    "recursive macro": (
        "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}{% set b = f(n - 1) %}{% endif %}{% endmacro %}{{ f(40) }}",
        "steps",
    ),
    "endless macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "center": ("{{ 'x' | center(1000000000) }}", "argument"),
    "mapped center": ("{{ ['x'] | map('center', 1000000000) | list }}", "argument"),
    "indent": ("{{ ('x\n' * 1000) | indent(1000000000) }}", "argument"),
    "ljust": ("{{ 'x'.ljust(1000000000) }}", "argument"),
    "percent": ("{{ '%1000000000d' % 1 }}", "formats"),
    "format filter": ("{{ '%1000000000d' | format(1) }}", "width"),
    "format star": ("{{ '%*d' | format(1000000000, 1) }}", "argument"),
    "format method": ("{{ '{:1000000000}'.format(1) }}", "width"),
    "format map": ("{{ '{x:1000000000}'.format_map({'x': 1}) }}", "width"),
    "computed width": ("{{ '{:{w}}'.format(1, w='1000000000') }}", "width"),
    "lost format": ("{% set f = '{:1000000000}'.format %}{{ f(1) }}", "width"),
    "replace": ("{% set x = 'a' * 9999 %}{{ x | replace('a', x) | length }}", "replace"),
    "replace method": ("{% set x = 'a' * 9999 %}{{ x.replace('a', x) | length }}", "replace"),
    "join": ("{% set x = 'a' * 9999 %}{{ range(9999) | join(x) | length }}", "join"),
    "join method": ("{% set x = 'a' * 9999 %}{{ x.join(x) | length }}", "join"),
    "join of a generator": ("{% set x = 'a' * 9999 %}{{ x.join(x | map('upper')) | length }}", "join"),
    "indent lines": ("{{ ('x\n' * 9999) | indent(99999) | length }}", "indent"),
    "indent with text": (
        "{% set x = 'a' * 99999 %}{{ ('x\n' * 9999) | indent(width=x) | length }}",
        "indent",
    ),
    "wordwrap": ("{% set x = 'a ' * 9999 %}{{ x | wordwrap(1, wrapstring=x) | length }}", "wordwrap"),
    "tojson indent": ("{{ range(9999) | list | tojson(indent=99999) | length }}", "tojson"),
    "format fields": ("{% set x = 'a' * 999999 %}{{ ('%s' * 999) | format(x, x) }}", "format"),
    "format method fields": ("{% set x = 'a' * 999999 %}{{ ('{0}' * 999).format(x) }}", "format"),
    "expandtabs": ("{{ ('\t' * 99999).expandtabs(99999) | length }}", "expandtabs"),
    "bytes": ("{{ 'x'.encode().ljust(9) }}", "encode"),
    "sum of lists": ("{{ ([[0] * 99] * 99) | sum(start=[]) | length }}", "sum adds numbers"),
    "laughs in lists": (
        "{% set n = namespace(x=['lol']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
        "value of more",
    ),
    "laughs in dicts": (
        "{% set n = namespace(x={}) %}{% for i in range(60) %}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n }}",
        "value of more",
    ),
    "laughs in tuples": (
        "{% set n = namespace(x=()) %}{% for i in range(60) %}{% set n.x = (n.x, n.x) %}{% endfor %}{{ n.x == n.x }}",
        "value of more",
    ),
    "laughs in calls": (
        "{% set n = namespace(x={}) %}{% for i in range(60) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}",
        "value of more",
    ),
    "a list of one long text": ("{% set x = 'a' * 99999 %}{{ [x] * 9999 }}", "value of more"),
    "output": ("{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}", "output"),
    "own budget": ("{% set _budget = 1 %}" + "{% for i in range(9999) %}" * 3 + "{% endfor %}" * 3, "steps"),
}


@pytest.fixture
def small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rules with less patience, so that the tests are quick."""
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 50_000)
    monkeypatch.setattr(template_sandbox, "MAX_VALUE_SIZE", 1 << 20)
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 3600.0)


@pytest.mark.usefixtures("small_budget")
@pytest.mark.parametrize(("source", "says"), BOMBS.values(), ids=BOMBS)
def test_no_template_can_hang_the_server(source: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        ChatTemplate(source).render(USER)


def test_namespaces_do_not_print_each_other() -> None:
    source = (
        "{% set n = namespace(x=namespace()) %}"
        "{% for i in range(60) %}{% set n.x = namespace(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}"
    )
    assert ChatTemplate(source).render(USER) == "<Namespace>"


def test_a_slow_template_runs_out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(template_sandbox.time, "monotonic", lambda: next(clock))
    with pytest.raises(RequestError, match="seconds"):
        ChatTemplate("{% for i in range(99999) %}{% endfor %}").render(USER)


def test_a_long_conversation_fits_the_budget() -> None:
    chat = [{"role": role, "content": "word " * 2000} for role in ("user", "assistant")] * 1000 + USER
    text = ChatTemplate(GEMMA, SPECIALS).render(chat)
    assert len(text) > 19_000_000
    assert text.count("<end_of_turn>") == 2001


BAD_MESSAGES: list[tuple[list[Any], str]] = [
    ([], "messages"),
    (["hi"], "messages[0]"),
    ([{"content": "hi"}], "messages[0].role"),
    ([{"role": 1, "content": "hi"}], "messages[0].role"),
    ([*USER, {"role": "user"}], "messages[1].content"),
    ([{"role": "user", "content": 5}], "messages[0].content"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
    (
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text"}]}],
        "messages[0].content[1].text",
    ),
    ([{"role": "user", "content": [7]}], "messages[0].content[0].type"),
    ([{"role": "assistant", "tool_calls": "x"}], "messages[0].tool_calls"),
]


@pytest.mark.parametrize(("messages", "param"), BAD_MESSAGES, ids=[param for _, param in BAD_MESSAGES])
def test_bad_messages_name_the_field(messages: list[Any], param: str) -> None:
    with pytest.raises(RequestError, match=re.escape(param)) as caught:
        ChatTemplate(SMOLLM2).render(messages)
    assert caught.value.param == param


def test_content_parts_and_tool_calls() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ m.role }}={{ m.content }};"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
        "{% if m.name is defined %}n{% endif %}{% endfor %}"
    )
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, "c"]
    calls = [
        {"id": "1", "function": {"name": "f", "arguments": '{"x": [1]}'}},
        {"id": "2", "function": {"name": "f", "arguments": "not json"}},
        {"id": "3", "function": {"name": "f", "arguments": ""}},
    ]
    text = template.render(
        [
            {"role": "user", "content": parts, "name": None},
            {"role": "assistant", "content": None, "tool_calls": calls},
        ]
    )
    assert text == 'user=a\nb\nc;assistant=;{"x": [1]}"not json"{}'
