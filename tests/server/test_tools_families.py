"""Tool calls of every family: what a model writes is what is read, however it is cut; hostile text; gpt-oss's channels;
and the family is found in templates like the real ones."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from server_fake import FakeEngine, make_client, make_tokenizer, says
from test_tools_parse import cut, read
from test_tools_server import DEFINED, accepts
from tokenizers import AddedToken

from octavo.api.chat.events import ChatEvent, Reasoning, Text, ToolArgs, ToolStart
from octavo.api.chat.formats.detect import detect_tools
from octavo.api.chat.formats.families import (
    BAR,
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    FUNCTIONGEMMA,
    GEMMA4,
    GLM45,
    GRANITE,
    HARMONY,
    KIMI_K2,
    LFM2,
    LLAMA4_PYTHONIC,
    OLMO3,
    PHI4_MINI,
    QWEN3_CODER,
)
from octavo.api.chat.formats.harmony import HarmonyReader
from octavo.api.chat.formats.tools import ToolSyntax
from octavo.api.chat.tools import ToolDefinition, ToolGrammar
from octavo.api.generation import TextDelta
from octavo.api.text.byte_tokenizer import build_byte_tokenizer
from octavo.api.text.template import ChatTemplate
from octavo.api.text.tokenizer import Tokenizer
from octavo.engine.structured.vocabulary import Vocabulary, build_tables

Calls = list[tuple[str, dict[str, Any]]]
FAMILIES = [
    *(DEEPSEEK_V3, DEEPSEEK_V31, KIMI_K2, PHI4_MINI, GRANITE, QWEN3_CODER, GLM45),
    *(FUNCTIONGEMMA, GEMMA4, LLAMA4_PYTHONIC, LFM2, OLMO3),
]
SEP, CALL = f"<{BAR}tool▁sep{BAR}>", f"<{BAR}tool▁call▁begin{BAR}>"


def gemma(value: Any, quote: str) -> str:
    if isinstance(value, str):
        return f"{quote}{value}{quote}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{gemma(item, quote)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(gemma(item, quote) for item in value) + "]"
    return json.dumps(value)


def tagged(syntax: ToolSyntax, name: str, args: dict[str, Any]) -> str:
    values = {key: v if isinstance(v, str) else json.dumps(v) for key, v in args.items()}
    if syntax is GLM45:
        inner = "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in values.items())
        return f"<tool_call>{name}\n{inner}</tool_call>"
    inner = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def write(syntax: ToolSyntax, made: Calls) -> str:
    """Calls as a well-behaved model writes them."""
    if not made:
        return ""
    if syntax.tags is not None:
        return "\n".join(tagged(syntax, name, args) for name, args in made)
    if syntax in (FUNCTIONGEMMA, GEMMA4):
        quote = syntax.program.quotes[0] if syntax.program else ""
        return "".join(f"{syntax.begin}call:{name}{gemma(args, quote)}{syntax.end}" for name, args in made)
    if syntax.program is not None:
        calls = [
            f"{name}({', '.join(f'{key}={value!r}' for key, value in args.items())})" for name, args in made
        ]
        if syntax is OLMO3:
            return f"{syntax.begin}\n" + "\n".join(calls) + f"\n{syntax.end}"
        listed = f"[{', '.join(calls)}]"
        return listed if syntax is LLAMA4_PYTHONIC else f"{syntax.begin}{listed}{syntax.end}"
    texts = [(name, json.dumps(args, ensure_ascii=False)) for name, args in made]
    if syntax is DEEPSEEK_V3:
        inner = "\n".join(
            f"{CALL}function{SEP}{name}\n```json\n{text}\n```{syntax.call_end}" for name, text in texts
        )
    elif syntax is DEEPSEEK_V31:
        inner = "".join(f"{CALL}{name}{SEP}{text}{syntax.call_end}" for name, text in texts)
    elif syntax is KIMI_K2:
        inner = "".join(
            f"<|tool_call_begin|>functions.{name}:{i}<|tool_call_argument_begin|>{text}<|tool_call_end|>"
            for i, (name, text) in enumerate(texts)
        )
    else:
        inner = "[" + ", ".join(f'{{"name": "{n}", "arguments": {t}}}' for n, t in texts) + "]"
    return f"{syntax.begin}{inner}{syntax.end}"


def kind_of(value: Any) -> str:
    kinds = {bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", str: "string"}
    return kinds.get(type(value), "null")


keys = st.from_regex(r"[a-z_]{1,6}", fullmatch=True).filter(lambda key: key not in ("true", "false", "null"))
texts = st.text(st.characters(exclude_characters="<", exclude_categories=("Cs",)), max_size=12)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
calls = st.lists(
    st.tuples(st.sampled_from(["f", "g"]), st.dictionaries(keys, values, max_size=4)), min_size=1, max_size=3
)


@given(
    syntax=st.sampled_from(FAMILIES),
    made=calls,
    before=st.sampled_from(["", "Let me see. 1 < 2"]),
    places=st.lists(st.integers(0, 999), max_size=12),
)
@settings(max_examples=300, deadline=None)
def test_what_is_written_is_read_however_it_is_cut(
    syntax: ToolSyntax, made: Calls, before: str, places: list[int]
) -> None:
    if syntax is LLAMA4_PYTHONIC:
        before = ""  # such calls have no mark of their own: only at the beginning they are known
    if syntax.tags is not None:  # values know no types but those of the schema
        made = [made[0]]
    schemas = {
        name: {"properties": {key: {"type": kind_of(value)} for key, value in args.items()}}
        for name, args in made
    }
    text = before + write(syntax, made)
    found = read(syntax, cut(text, places), schemas=schemas)
    if before:
        assert found[0] == ("text", before)
    told = [part for part in found if part[0] == "call"]
    assert [(part[2], json.loads(part[3])) for part in told] == made
    assert found == read(syntax, [text], schemas=schemas) == read(syntax, list(text), schemas=schemas)


FRAGMENTS = f"""<tool_call> </tool_call> <function= > </function> <parameter= </parameter> <arg_key> </arg_key> <arg_value>
</arg_value> <|tool_calls_section_begin|> <|tool_call_begin|> functions.f:0 <|tool_call_argument_begin|> <|tool_call_end|>
<{BAR}tool▁calls▁begin{BAR}> {CALL} function {SEP} f ```json <start_function_call> call: <end_function_call> <escape> {{ }}
[ ] ( ) = : , " ' \\ \\u12 None 1 -1.5e3 a=1 f( "x" é __import__('os').system('true') <|tool_call|> <function_calls>"""
fragments = st.lists(st.sampled_from([*FRAGMENTS.split(), " ", "\n"]), max_size=16)


@given(syntax=st.sampled_from(FAMILIES), parts=fragments, places=st.lists(st.integers(0, 999), max_size=10))
@settings(max_examples=400, deadline=None)
def test_any_text_gives_the_same_however_it_is_cut(
    syntax: ToolSyntax, parts: list[str], places: list[int]
) -> None:
    text = "".join(parts)
    whole = read(syntax, [text])
    assert read(syntax, cut(text, places)) == whole
    assert read(syntax, list(text)) == whole
    if all(part[0] == "text" for part in whole):
        assert "".join(part[1] for part in whole) == text  # nothing is lost where there was no call


MEGABYTE = 1 << 20
TAGGED, PYTHONS, NAMED = (QWEN3_CODER, GLM45), (LLAMA4_PYTHONIC, OLMO3), (DEEPSEEK_V31, KIMI_K2)
HOSTILE: list[tuple[str, tuple[ToolSyntax, ...]]] = [
    ("<tool_call><function=f>" + "<parameter=a>" * (MEGABYTE // 13), TAGGED),
    ("<tool_call><function=f></function></tool_call>" * (MEGABYTE // 46), TAGGED),
    ("<tool_call>f</tool_call>" * (MEGABYTE // 24), TAGGED),
    ("<tool_call>f\n<arg_key>a</arg_key><arg_value>" + "</arg" * (MEGABYTE // 5), TAGGED),
    ("[f(" + "a=1," * (MEGABYTE // 4), PYTHONS),
    ("[f(a=" + "[" * MEGABYTE, PYTHONS),
    ("[f(a='" + "\\'" * (MEGABYTE // 2), PYTHONS),
    ("[" * MEGABYTE, PYTHONS),
    ("<start_function_call>call:f{a:<escape>" + "<escap" * (MEGABYTE // 6), (FUNCTIONGEMMA, GEMMA4)),
    (f"<{BAR}tool▁calls▁begin{BAR}>" + CALL * (MEGABYTE // 22), NAMED),
    ("<|tool_calls_section_begin|>" + "<|tool_call_begin|>functions.f:0" * (MEGABYTE // 32), NAMED),
    ("<" * MEGABYTE, (*TAGGED, GRANITE, LFM2)),
]


@pytest.mark.parametrize(("text", "syntaxes"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_megabyte_of_hostile_text_takes_linear_time(text: str, syntaxes: tuple[ToolSyntax, ...]) -> None:
    for syntax in syntaxes:
        begin = time.process_time()
        read(syntax, [text])
        assert time.process_time() - begin < 10, syntax.name


def test_what_looks_like_a_program_is_never_run() -> None:
    said = "[f(a=__import__('os').system('touch /tmp/never'), b=1)]"
    parts = read(LLAMA4_PYTHONIC, [said])
    assert parts[0][:3] == ("call", 0, "f")  # the name was told before the arguments turned out to be none
    with pytest.raises(ValueError):
        json.loads(parts[0][3])
    assert [part[0] for part in parts[1:]] == ["text"]
    assert read(LLAMA4_PYTHONIC, ["[1] As the source says [2]."]) == [("text", "[1] As the source says [2].")]
    assert read(LLAMA4_PYTHONIC, ["[h(a=1)]"]) == [("text", "[h(a=1)]")]  # there is no such tool


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("a='it\\'s', b=\"x\"", {"a": "it's", "b": "x"}),
        ("a='\\n\\t\\x41\\u00e9\\U0001F389\\q'", {"a": "\n\tAé🎉\\q"}),
        ("a='''x'y''', b=\"\"", {"a": "x'y", "b": ""}),
        (
            "a=True, b=None, c=(1, 2), d={'k': [-1.5e3]},",
            {"a": True, "b": None, "c": [1, 2], "d": {"k": [-1500.0]}},
        ),
        ("a=0x10, b=celsius", {"a": "0x10", "b": "celsius"}),
        ("", {}),
    ],
)
def test_python_values(written: str, expected: dict[str, Any]) -> None:
    for text in ([f"[f({written})]"], list(f"[f({written})]")):
        assert json.loads(read(LLAMA4_PYTHONIC, text)[0][3]) == expected


# -- gpt-oss ------------------------------------------------------------------------------------------------------

ANSWER = (
    "<|channel|>analysis<|message|>Need <weather>.<|end|><|start|>assistant<|channel|>commentary<|message|>Let me look."
    '<|end|><|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Köln"}'
    "<|call|>"
)


def harmony(pieces: list[str], **options: Any) -> tuple[list[tuple[str, ...]], HarmonyReader]:
    reader = HarmonyReader(0, new_id=lambda: "id", **options)
    events: list[ChatEvent] = []
    for i, piece in enumerate(pieces):
        events += reader.push(TextDelta(piece, [1], "stop" if i == len(pieces) - 1 else None))
    parts: list[list[str]] = []
    for event in events:
        if isinstance(event, ToolStart):
            parts.append(["call", event.name, ""])
            continue
        assert isinstance(event, Text | Reasoning | ToolArgs)
        kind = {Text: "text", Reasoning: "thought", ToolArgs: "call"}[type(event)]
        if not parts or parts[-1][0] != kind:
            parts.append([kind, ""])
        parts[-1][-1] += event.text
    return [tuple(part) for part in parts], reader


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            ANSWER,
            [
                ("thought", "Need <weather>."),
                ("text", "Let me look."),
                ("call", "weather", '{"city": "Köln"}'),
            ],
        ),
        ("<|channel|>final<|message|>Hi<|return|>", [("text", "Hi")]),
        ("just text", [("text", "just text")]),
        ("<|channel|>analysis<|message|>cut off", [("thought", "cut off")]),
        (" to=functions.f<|channel|>commentary json<|message|>{}", [("call", "f", "{}")]),
        ("<|channel|>commentary to=functions.f<|message|><|call|>", [("call", "f", "{}")]),
        ("<|channel|>final<|message|>a<|x|>b<|", [("text", "a<|x|>b<|")]),
        ("", []),
    ],
)
def test_channels(said: str, expected: list[tuple[str, ...]]) -> None:
    for pieces in ([said], list(said) or [""], cut(said, [3, 30, 31, 60])):
        assert harmony(pieces)[0] == expected


def test_channels_end_counts_and_options() -> None:
    _, reader = harmony(list(ANSWER))
    assert reader.finish_reason("stop") == "tool_calls" and reader.finish_reason("length") == "length"
    thought = len("Need <weather>.")
    assert thought <= reader.num_reasoning_tokens <= thought + len("<|end|>") + 1
    hidden, _ = harmony([ANSWER], show_reasoning=False)
    assert [part[0] for part in hidden] == ["text", "call"]
    two = ANSWER + ANSWER
    assert len([p for p in harmony([two], parallel=False)[0] if p[0] == "call"]) == 1
    begin = time.process_time()
    for text in ("<|end|>" * 150_000, "<|channel|>" * 100_000, "<|channel|>x<|message|>y" * 40_000):
        harmony([text[i : i + 4096] for i in range(0, len(text), 4096)])
    assert time.process_time() - begin < 10


# -- grammars and requests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [DEEPSEEK_V3, DEEPSEEK_V31, KIMI_K2, PHI4_MINI], ids=lambda s: s.name)
def test_grammars_of_sections(syntax: ToolSyntax) -> None:
    good: Calls = [("weather", {"city": "x", "days": 2})]
    other: Calls = [('ti"me', {})]
    if syntax is PHI4_MINI:
        other = [("time", {})]
    tools = [(0, DEFINED[0]), (1, ToolDefinition(other[0][0]))]
    must = ToolGrammar(syntax, make_tokenizer()).text(tools, True, True)
    assert accepts(must, write(syntax, good)) and accepts(must, write(syntax, other + good))
    bad: list[Calls] = [
        [("weather", {"days": 2})],
        [("weather", {"city": "x", "days": 10})],
        [("nothing", {})],
    ]
    for calls_ in bad:
        assert not accepts(must, write(syntax, calls_)), calls_
    assert not accepts(must, "Hello")
    single = ToolGrammar(syntax, make_tokenizer()).text(tools, True, False)
    assert accepts(single, write(syntax, good)) and not accepts(single, write(syntax, good + good))
    free = ToolGrammar(syntax, make_tokenizer()).text(tools, False, True)
    assert accepts(free, "Hello") and accepts(free, write(syntax, good)) and accepts(free, "")
    assert not accepts(free, write(syntax, bad[0]))


def test_grammar_of_channels() -> None:
    marks = ["<|channel|>", "<|message|>", "<|end|>", "<|start|>"]
    built = build_byte_tokenizer({"vocab_size": 298, "eos_token_id": 257})
    built.backend.add_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer = Tokenizer(built)
    tables = build_tables(
        Vocabulary(
            tokens=[tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)],
            special_ids=tokenizer.special_ids,
            eos_token_ids=(257,),
            encode=lambda text: list(text.encode()),
        ),
        tokenizer.vocab_size,
    )

    def fits(grammar: str, text: str) -> bool:
        matcher = LLMatcher(tables, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        ids = tokenizer.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    maker = ToolGrammar(HARMONY, tokenizer)
    assert maker.shows_specials
    must, free = (maker.text([(0, DEFINED[0])], must, True) for must in (True, False))
    call = '<|channel|>commentary to=functions.weather<|message|>{"city": "x"}'
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    for text in (call, thought + call):
        assert fits(must, text) and fits(free, text)
    answer = "<|channel|>final<|message|>Hi"
    assert fits(free, thought + answer) and not fits(must, thought + answer)
    assert not fits(must, call.replace("city", "town"))


def test_a_schema_is_enforced_in_json_where_the_family_has_none() -> None:
    source = dict(TEMPLATES)[QWEN3_CODER]
    said = '<tool_call>\n{"name": "weather", "arguments": {"city": "x"}}\n</tool_call>'
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": tools}
    engine = FakeEngine(rule=says(said), max_model_len=4096)
    client = make_client(engine, template=source)
    made = client.post("/v1/chat/completions", json={**body, "tool_choice": "required"}).json()["choices"][0]
    assert engine.submitted[-1].grammar is not None
    assert made["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "x"}'
    engine.rule = says(
        "<tool_call>\n<function=weather>\n<parameter=city>\nx\n</parameter>\n</function>\n</tool_call>"
    )
    free = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert engine.submitted[-1].grammar is None and free["finish_reason"] == "tool_calls"
    assert json.loads(free["message"]["tool_calls"][0]["function"]["arguments"]) == {"city": "x"}


def test_channels_over_http_in_every_dialect() -> None:
    source = dict(TEMPLATES)[HARMONY]
    client = make_client(FakeEngine(rule=says(ANSWER), max_model_len=4096), template=source)
    hi: Any = [{"role": "user", "content": "Hi"}]
    chat = client.post("/v1/chat/completions", json={"messages": hi, "reasoning_effort": "high"}).json()
    message = chat["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] == "Need <weather>."
    assert message["content"] == "Let me look." and message["tool_calls"][0]["function"]["name"] == "weather"
    assert chat["choices"][0]["finish_reason"] == "tool_calls"
    claude = client.post("/v1/messages", json={"messages": hi, "max_tokens": 900}).json()
    assert [block["type"] for block in claude["content"]] == ["thinking", "text", "tool_use"]
    items = client.post("/v1/responses", json={"input": "Hi"}).json()["output"]
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call"]
    local = client.post("/api/chat", json={"messages": hi, "stream": False}).json()["message"]
    assert local["thinking"] == "Need <weather>." and local["tool_calls"][0]["function"]["arguments"]


# -- found in templates -------------------------------------------------------------------------------------------

HEAD = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}"
TAIL = "{% endfor %}{% endfor %}"
F, A = "{{ c.function.name }}", "{{ c.function.arguments | tojson }}"
EACH = "{% for k, v in c.function.arguments.items() %}"
TEMPLATES = [
    (
        DEEPSEEK_V3,
        (
            f"{HEAD}<{BAR}tool▁calls▁begin{BAR}>{CALL}function{SEP}{F}\n```json\n{A}\n```"
            f"<{BAR}tool▁call▁end{BAR}><{BAR}tool▁calls▁end{BAR}>{TAIL}"
        ),
    ),
    (
        DEEPSEEK_V31,
        f"{HEAD}<{BAR}tool▁calls▁begin{BAR}>{CALL}{F}{SEP}{A}<{BAR}tool▁call▁end{BAR}><{BAR}tool▁calls▁end{BAR}>{TAIL}",
    ),
    (
        KIMI_K2,
        (
            f"{HEAD}<|tool_calls_section_begin|><|tool_call_begin|>functions.{F}:0<|tool_call_argument_begin|>{A}"
            f"<|tool_call_end|><|tool_calls_section_end|>{TAIL}"
        ),
    ),
    (
        QWEN3_CODER,
        HEAD
        + f"<tool_call>\n<function={F}>\n{EACH}<parameter={{{{ k }}}}>\n{{{{ v }}}}\n</parameter>\n{{% endfor %}}"
        f"</function>\n</tool_call>{TAIL}",
    ),
    (
        GLM45,
        HEAD
        + f"<tool_call>{F}\n{EACH}<arg_key>{{{{ k }}}}</arg_key>\n<arg_value>{{{{ v }}}}</arg_value>\n{{% endfor %}}"
        f"</tool_call>{TAIL}",
    ),
    (
        FUNCTIONGEMMA,
        HEAD
        + "<start_function_call>call:"
        + F
        + "{{ '{' }}"
        + EACH
        + "{{ k }}:{% if v is string %}<escape>{{ v }}<escape>"
        "{% else %}{{ v }}{% endif %}{% endfor %}{{ '}' }}<end_function_call>" + TAIL,
    ),
    (
        LFM2,
        f"{HEAD}<|tool_call_start|>[{F}({EACH}{{{{ k }}}}={{{{ v }}}}{{% endfor %}})]<|tool_call_end|>{TAIL}",
    ),
    (OLMO3, f"{HEAD}<function_calls>{F}({EACH}{{{{ k }}}}={{{{ v }}}}{{% endfor %}})</function_calls>{TAIL}"),
    (
        LLAMA4_PYTHONIC,
        f"{HEAD}<|python_start|>[{F}({EACH}{{{{ k }}}}={{{{ v }}}}{{% endfor %}})]<|python_end|>{TAIL}",
    ),
    (
        PHI4_MINI,
        "{% if tools %}<|tool|>{{ tools }}<|/tool|>{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}",
    ),
    (GRANITE, f'{HEAD}<|tool_call|>[{{"name": "{F}", "arguments": {A}}}]{TAIL}'),
    (
        HARMONY,
        f"{HEAD}<|start|>assistant to=functions.{F}<|channel|>commentary json<|message|>{A}<|call|>{TAIL}",
    ),
]


@pytest.mark.parametrize(("syntax", "source"), TEMPLATES, ids=[syntax.name for syntax, _ in TEMPLATES])
def test_the_family_is_read_from_the_template(syntax: ToolSyntax, source: str) -> None:
    assert detect_tools(ChatTemplate(source)) is syntax
