"""Whatever grammar passes the front half, the engine survives it: walks over allowed tokens end, go on, or fail alone."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from structured_engine import EOS, VOCAB, VOCABULARY, answer, grammar_request, make_core

from octavo.api.structured import make_grammar
from octavo.engine.structured.compiler import GrammarCompiler
from octavo.engine.structured.grammar import GrammarError
from octavo.errors import RequestError
from octavo.protocol.generate import StructuredOutputsParams

COMPILER = GrammarCompiler(lambda: VOCABULARY, VOCAB)
PIECES = [
    "a",
    "b",
    "[^x]",
    ".",
    "\\d",
    "(",
    ")",
    "|",
    "*",
    "+",
    "?",
    "{2,40}",
    "{3}",
    "[a-f]",
    "\\n",
    "é",
    "$",
    "^",
    "\\",
    "/",
]
leaves = st.sampled_from(
    [
        {"type": "integer", "minimum": -3, "maximum": 40},
        {"type": "number"},
        {"type": "string", "maxLength": 4},
        {"type": "string", "pattern": "^(ab|c){1,3}$"},
        {"type": "string", "format": "date"},
        {"enum": ["x", 1, None, '\u20ac"']},
        {"const": {"k": [1, 2]}},
        {"type": "boolean"},
        {"$ref": "#/$defs/d"},
        {"not": {}},
        {},
    ]
)
schemas = st.recursive(
    leaves,
    lambda inner: (
        st.builds(
            lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 3)
        )
        | st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3))
        | st.builds(
            lambda values, closed: {
                "type": "object",
                "properties": values,
                "required": sorted(values)[:1],
                "additionalProperties": not closed,
            },
            st.dictionaries(st.sampled_from(["a", "b c", "\u00fc", '"']), inner, max_size=3),
            st.booleans(),
        )
    ),
    max_leaves=6,
)


def walk(params: StructuredOutputsParams, choices: list[int]) -> str | None:
    """Random allowed tokens; the text where the grammar ended, None where it did not (yet) or refused."""
    try:
        grammar = COMPILER.compile(make_grammar(params, "p")).result(30).start([EOS])
        text = b""
        for choice in choices:
            if grammar.ended:
                return text.decode()
            mask = grammar.mask()
            allowed = [i for i in range(VOCAB) if mask[i >> 3] >> (i & 7) & 1]
            assert allowed and max(allowed) <= EOS
            token = EOS if EOS in allowed else allowed[choice % len(allowed)]
            assert grammar.accept(token)
            if token == EOS:
                return text.decode()
            text += bytes([token])
    except (RequestError, GrammarError):
        pass
    return None


@given(schema=schemas, choices=st.lists(st.integers(0, 10_000), min_size=20, max_size=60))
@settings(max_examples=150, deadline=None)
def test_walks_through_schemas(schema: dict[str, Any], choices: list[int]) -> None:
    whole = {**schema, "$defs": {"d": {"type": "integer"}}}
    text = walk(StructuredOutputsParams(json=whole), choices)
    if text is not None:
        json.loads(text)


@given(
    parts=st.lists(st.sampled_from(PIECES), min_size=1, max_size=12),
    choices=st.lists(st.integers(0, 10_000), min_size=10, max_size=40),
)
@settings(max_examples=200, deadline=None)
def test_walks_through_regexes(parts: list[str], choices: list[int]) -> None:
    walk(StructuredOutputsParams(regex="".join(parts)), choices)


@given(schema=schemas, overlap=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_engine_answers_with_json(schema: dict[str, Any], overlap: bool) -> None:
    params = StructuredOutputsParams(json={**schema, "$defs": {"d": {"type": "integer"}}})
    try:
        grammar = make_grammar(params, "p")
    except RequestError:
        return
    core, _ = make_core(overlap=overlap)
    answers = answer(
        core,
        [grammar_request(1, grammar, prompt_len=20, max_tokens=150), grammar_request(2, None, prompt_len=9)],
    )
    assert len(answers) == 2
    text, reason = answers[1]
    assert reason in ("stop", "length")
    if reason == "stop":
        json.loads(text)
    core.close()
