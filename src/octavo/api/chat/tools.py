"""What a request's tools mean for its prompt, its grammar and the reading of its answer."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from octavo.api.chat.formats.tools import ToolSyntax
from octavo.api.structured import LARGE_GRAMMAR, WHITESPACE, checked, quoted
from octavo.api.text.tokenizer import Tokenizer
from octavo.errors import RequestError
from octavo.protocol.generate import StructuredOutputsParams

Mode = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class ToolDefinition:
    """One function: ``parameters`` is a JSON schema (None: it takes none); ``strict`` asks that it is enforced."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False

    def for_template(self) -> dict[str, Any]:
        """As templates know tools (OpenAI's form)."""
        function: dict[str, Any] = {"name": self.name, "description": self.description or ""}
        function["parameters"] = self.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolPlan:
    """Tools of one request, decided. ``grammar`` is None where the model is free."""

    syntax: ToolSyntax
    tools: tuple[ToolDefinition, ...] = field(default_factory=tuple)
    parallel: bool = True
    grammar: StructuredOutputsParams | None = None
    shows_specials: bool = False  # markers are special tokens: the text must keep those

    @property
    def names(self) -> list[str]:
        """The functions that may be called."""
        return [tool.name for tool in self.tools]


async def plan_tools(
    tools: list[ToolDefinition],
    mode: Mode,
    named: str | None,
    *,
    parallel: bool,
    syntax: ToolSyntax,
    tokenizer: Tokenizer,
) -> ToolPlan | None:
    """Decide; None where no tool may be called. ``named`` is the one function that must be called.

    Raises ``RequestError`` for contradictions, and for a strict schema that cannot be enforced (its keywords are named).
    """
    names = [tool.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise RequestError(f"tools[{i}].function.name {name!r} is there twice.", param=f"tools[{i}]")
    if named is not None and named not in names:
        raise RequestError(f"tool_choice names {named!r}, which is not among the tools.", param="tool_choice")
    if not tools:
        if mode == "required":
            raise RequestError("tool_choice 'required' needs tools.", param="tool_choice")
        return None
    if mode == "none" and named is None:
        return None
    maker = ToolGrammar(syntax, tokenizer)
    must = mode == "required" or named is not None
    grammar = None
    if must or any(tool.strict for tool in tools):
        chosen = [(i, tool) for i, tool in enumerate(tools) if named in (None, tool.name)]
        many = parallel and named is None
        size = sum(len(str(tool.parameters)) for _, tool in chosen)
        if size > LARGE_GRAMMAR:
            text = await asyncio.to_thread(maker.text, chosen, must, many)
        else:
            text = maker.text(chosen, must, many)
        grammar = StructuredOutputsParams(grammar=text)
    return ToolPlan(syntax, tuple(tools), parallel, grammar, maker.shows_specials)


class ToolGrammar:
    """Writes calls of one syntax as a Lark grammar."""

    def __init__(self, syntax: ToolSyntax, tokenizer: Tokenizer) -> None:
        self._syntax = syntax
        self._tokenizer = tokenizer
        marks = (syntax.begin, syntax.end, syntax.args_mark)
        self.shows_specials = any(self._special_id(mark) is not None for mark in marks if mark)

    def text(self, tools: list[tuple[int, ToolDefinition]], must: bool, many: bool) -> str:
        """The grammar of one call (or more, with ``many``), or with ``must`` False of any text with calls in it."""
        syntax = self._syntax
        # In free text a lazy lexeme ends at the first marker; the call's own marker is then part of it.
        lazy = bool(syntax.end) and not must and self._special_id(syntax.begin) is None
        rules = [f"call_{i}: {self._call(i, tool, opened=lazy)}" for i, tool in tools]
        rules += [f"args_{i}: %json {self._schema(i, tool)}" for i, tool in tools]
        calls = " | ".join(f"call_{i}" for i, _ in tools)
        if syntax.end:
            one = f"({calls})"
            section = one + (f' ("\\n" {one})*' if many else "")
            rules.insert(0, f"start: {section}" if must else self._in_text(calls, many))
            return "\n".join(rules)
        rules.append(f"call: {calls}")
        separator = f"{quoted(syntax.separator)} " if syntax.separator else ""
        inner = "call" + (f" ({separator}call)*" if many else "")
        if syntax.is_list:
            inner = f'{self._mark(syntax.begin)} "[" {inner} "]"'
        rules.append(f"calls: {inner}")
        rules.insert(0, "start: calls" if must else self._or_text())
        return "\n".join(rules)

    def _call(self, i: int, tool: ToolDefinition, *, opened: bool) -> str:
        syntax, name = self._syntax, tool.name
        if syntax.args_mark:
            return f"{self._mark(syntax.begin)} {quoted(name)} {self._mark(syntax.args_mark)} args_{i}"
        head = quoted(f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{syntax.args_key}": ')
        if not syntax.end:
            return f'{head} args_{i} "}}"'
        begin = "" if opened else self._mark(syntax.begin)
        return f'{begin} "\\n" {head} args_{i} "}}\\n" {self._mark(syntax.end)}'

    def _in_text(self, calls: str, many: bool) -> str:
        """Free text, and after the opening marker nothing but a call."""
        begin = self._syntax.begin
        times = "*" if many else "?"
        if self._special_id(begin) is not None:  # free text never holds a special token
            return f"start: TEXT (({calls}) TEXT){times}\nTEXT: /(.|\\n)*/"
        head = f"start: (to_call ({calls})){times} TEXT\nTEXT: /(.|\\n)*/\n"
        return head + f"to_call[lazy]: /(.|\\n)*{_escaped(begin)}/"

    def _or_text(self) -> str:
        """Calls or free text: the first characters decide."""
        syntax = self._syntax
        if syntax.bare:
            return "start: calls | TEXT\nTEXT: /([^{ \\n](.|\\n)*)?/"
        if self._special_id(syntax.begin) is not None:
            return "start: TEXT calls?\nTEXT: /(.|\\n)*/"
        return "start: calls | TEXT\nTEXT: /([^\\[](.|\\n)*)?/"

    def _schema(self, i: int, tool: ToolDefinition) -> str:
        given: dict[str, Any] = tool.parameters or {"properties": {}, "additionalProperties": False}
        schema = {"type": "object", **given}
        schema["x-guidance"] = {"lenient": False, "whitespace_pattern": WHITESPACE}
        try:
            text = json.dumps(schema)
            checked(f"start: %json {text}", f"tools[{i}].function.parameters")
        except RecursionError:
            raise RequestError(
                f"tools[{i}].function.parameters is nested too deeply.",
                param=f"tools[{i}].function.parameters",
            ) from None
        except RequestError:
            if tool.strict:
                raise
            # Not strict: a schema that cannot be enforced is advice. It is JSON in any case.
            return '{"type": "object"}'
        return text

    def _special_id(self, mark: str) -> int | None:
        token_id = self._tokenizer.id_of(mark)
        return token_id if token_id is not None and token_id in self._tokenizer.special_ids else None

    def _mark(self, mark: str) -> str:
        """A marker as the grammar writes it: a special token by its id, anything else as text."""
        token_id = self._special_id(mark)
        return quoted(mark) if token_id is None else f"<[{token_id}]>"


def _escaped(text: str) -> str:
    """``text`` inside a Lark regular expression."""
    return "".join(char if char.isalnum() or char in "_<>" else f"\\{char}" for char in text)
