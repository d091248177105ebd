"""From what a request asks an answer to look like to a grammar the engine can compile; nonsense ends here.

The text is llguidance's: a Lark grammar, or JSON that wraps a schema or a regular expression. It is checked without the
model's vocabulary (about a millisecond), so a request that cannot be served is refused before it is queued.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import OrderedDict
from functools import partial
from typing import Any

import msgspec

from octavo.api.structural_tags import tag_grammar
from octavo.errors import RequestError, is_panic
from octavo.protocol.generate import SamplingParams, StructuredOutputsParams

MAX_SCHEMA_CHARS = 262_144
MAX_KEPT = 64
LARGE_GRAMMAR = 8_192  # characters; checking more than this is done beside the event loop
# Small models like to fill the space between two values with newlines until the context is full.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
_CURES = {
    "Unimplemented keys": "Remove the keywords; they cannot be enforced.",
    "look-around": "Write the expression without look-around.",
}


class Grammars:
    """Makes grammars and remembers the last ones that were fine."""

    def __init__(self) -> None:
        self._kept: OrderedDict[bytes, str] = OrderedDict()

    def grammar(self, params: StructuredOutputsParams, param: str = "structured_outputs") -> str:
        """The grammar of ``params``. Raises ``RequestError`` that names the field and what cannot be enforced."""
        key = msgspec.json.encode(params)
        return self._kept.get(key) or self._keep(key, make_grammar(params, param))

    async def grammar_async(self, params: StructuredOutputsParams, param: str = "structured_outputs") -> str:
        """``grammar``, in a thread where it is so large that other streams would wait for it."""
        key = msgspec.json.encode(params)
        if len(key) <= LARGE_GRAMMAR or key in self._kept:
            return self.grammar(params, param)
        return self._keep(key, await asyncio.to_thread(make_grammar, params, param))

    def _keep(self, key: bytes, grammar: str) -> str:
        self._kept[key] = grammar
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return grammar

    def split(self, sampling: SamplingParams) -> tuple[SamplingParams, str | None]:
        """Parameters for the engine, and the grammar that takes the place of ``structured_outputs``."""
        if sampling.structured_outputs is None:
            return sampling, None
        grammar = self.grammar(sampling.structured_outputs)
        return msgspec.structs.replace(sampling, structured_outputs=None), grammar


def make_grammar(params: StructuredOutputsParams, param: str) -> str:
    """The checked grammar of ``params``; ``param`` names them in errors."""
    try:
        return checked(_text(params, param), param)
    except BaseException as error:
        if not is_panic(error):
            raise
        raise RequestError(f"{param}: this grammar cannot be read.", param=param) from None


def _text(params: StructuredOutputsParams, param: str) -> str:
    from llguidance import LLMatcher, regex_to_lark  # 60 ms that a server without grammars never pays

    if params.grammar is not None:
        return LLMatcher.grammar_from_lark(params.grammar)
    if params.regex is not None:
        # \d and \w mean ASCII, as in JSON schemas: nobody who asks for digits wants those of other scripts.
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(params.regex, 'dw')}/")
    if params.choice is not None:
        return LLMatcher.grammar_from_lark(choice_rule(params.choice))
    if params.structural_tag is not None:
        return LLMatcher.grammar_from_lark(
            tag_grammar(params.structural_tag, param, partial(embedded_schema, params, param=param))
        )
    return schema_grammar(params, {"type": "object"} if params.json is None else params.json, param)


def choice_rule(choices: list[str]) -> str:
    """A Lark grammar of exactly these texts."""
    return "start: " + " | ".join(quoted(choice) for choice in choices)


def quoted(text: str) -> str:
    """``text`` as a Lark string: JSON's form, but that Lark does not know DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def schema_grammar(params: StructuredOutputsParams, schema: object, param: str) -> str:
    """The grammar of a JSON schema, given as an object or as its text."""
    from llguidance import LLMatcher

    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{param}: the JSON schema is not JSON: {error}.", param=param) from None
    try:
        if params.disable_additional_properties:
            schema = _closed(schema)
        text = json.dumps(schema, ensure_ascii=False)
    except RecursionError:
        raise RequestError(f"{param}: the JSON schema is nested too deeply.", param=param) from None
    if len(text) > MAX_SCHEMA_CHARS:
        raise RequestError(
            f"{param}: the JSON schema has {len(text)} characters, at most {MAX_SCHEMA_CHARS} are allowed.",
            param=param,
        )
    # What a schema says under "x-guidance" cannot make it lenient: these have the last word.
    try:
        return LLMatcher.grammar_from_json_schema(text, overrides=_guidance(params))
    except ValueError as error:
        raise RequestError(f"{param}: {error}.", param=param) from None


def embedded_schema(params: StructuredOutputsParams, schema: Any, *, param: str) -> dict[str, Any]:
    """A schema as a part of a larger grammar, under the same rules as one that stands alone."""
    if schema is False:
        raise RequestError(f"{param}: the schema false allows nothing.", param=param)
    made = {} if schema is True else schema
    if params.disable_additional_properties:
        made = _closed(made)
    return {**made, "x-guidance": _guidance(params)}


def _guidance(params: StructuredOutputsParams) -> Any:
    pattern = None if params.disable_any_whitespace else (params.whitespace_pattern or WHITESPACE)
    return {
        "lenient": False,
        "whitespace_flexible": not params.disable_any_whitespace,
        "whitespace_pattern": pattern,
    }


def _closed(schema: Any) -> Any:
    """The schema with ``additionalProperties: false`` in every object that says nothing of it."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        closed["additionalProperties"] = False
    return closed


def checked(text: str, param: str) -> str:
    """``text`` if it is a grammar within the limits; raises ``RequestError`` with the reason otherwise."""
    from llguidance import LLMatcher, LLParserLimits

    wrong, messages = LLMatcher.validate_grammar_with_warnings(
        text, limits=LLParserLimits(verbose_errors=False)
    )
    if not wrong:
        return text
    message = re.sub(r"\s+", " ", " ".join(messages)).strip()[:500]
    cure = next((cure for mark, cure in _CURES.items() if mark in message), None)
    raise RequestError(f"{param}: {message}", param=param, cure=cure)
