"""What a request's tools mean for its prompt, its grammar and the reading of its answer."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from octavo.api.chat.formats.families import GENERIC, HARMONY
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
    def schemas(self) -> dict[str, dict[str, Any] | None]:
        """Their parameters."""
        return {tool.name: tool.parameters for tool in self.tools}

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
    must = mode == "required" or named is not None
    if not syntax.is_json and (must or any(tool.strict for tool in tools)):
        syntax = GENERIC  # a schema can be enforced in JSON alone
    maker = ToolGrammar(syntax, tokenizer)
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
        marks = (syntax.begin, syntax.end, syntax.args_mark, syntax.call_begin)
        self.shows_specials = any(self._special_id(mark) is not None for mark in marks if mark)

    def text(self, tools: list[tuple[int, ToolDefinition]], must: bool, many: bool) -> str:
        """The grammar of one call (or more, with ``many``), or with ``must`` False of any text with calls in it."""
        syntax = self._syntax
        # In free text a lazy lexeme ends at the first marker; the call's own marker is then part of it.
        lazy = bool(syntax.end) and not must and self._special_id(syntax.begin) is None
        rules = [f"call_{i}: {self._call(i, tool, opened=lazy)}" for i, tool in tools]
        rules += [f"args_{i}: %json {self._schema(i, tool)}" for i, tool in tools]
        calls = " | ".join(f"call_{i}" for i, _ in tools)
        if syntax is HARMONY:
            rules[:0] = self._channels(calls, must)
            return "\n".join(rules)
        if syntax.call_begin or (syntax.end and syntax.is_list):
            rules[:0] = self._sections(calls, must, many)
            return "\n".join(rules)
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
        if syntax.call_begin:
            return self._named(i, name)
        if syntax.args_mark:
            return f"{self._mark(syntax.begin)} {quoted(name)} {self._mark(syntax.args_mark)} args_{i}"
        head = quoted(f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{syntax.args_key}": ')
        if not syntax.end or syntax.is_list:
            return f'{head} args_{i} "}}"'
        begin = "" if opened else self._mark(syntax.begin)
        return f'{begin} "\\n" {head} args_{i} "}}\\n" {self._mark(syntax.end)}'

    def _named(self, i: int, name: str) -> str:
        """A call whose name and arguments stand between marks of their own."""
        syntax = self._syntax
        marks = [self._mark(syntax.call_begin)]
        marks += [quoted(syntax.name_before)] if syntax.name_before else []
        marks += [self._mark(syntax.name_mark)] if syntax.name_mark else []
        marks += [quoted(name)]
        marks += ['":" /[0-9]{1,3}/'] if syntax.numbered else []
        marks += [self._mark(syntax.args_mark), f"args_{i}"]
        marks += [quoted(syntax.args_end)] if syntax.args_end else []
        marks += [self._mark(syntax.call_end)] if syntax.call_end else []
        return " ".join(marks)

    def _channels(self, calls: str, must: bool) -> list[str]:
        """Thoughts, if there are any, then a call or (without ``must``) an answer; any end token ends it."""
        channel, message = self._mark("<|channel|>"), self._mark("<|message|>")
        end, start = self._mark("<|end|>"), self._mark("<|start|>")
        thought = f'thought: {channel} "analysis" {message} TEXT {end} {start} "assistant"'
        answer = "" if must else f' | {channel} "final" {message} TEXT'
        return [f"start: thought? ({calls}{answer})", "TEXT: /(.|\\n)*/", thought]

    def _sections(self, calls: str, must: bool, many: bool) -> list[str]:
        """Calls together between the marks of one section, alone or behind free text."""
        syntax = self._syntax
        separator = f"{quoted(syntax.separator)} " if syntax.separator else ""
        inner = f"({calls})" + (f" ({separator}({calls}))*" if many else "")
        if syntax.is_list:
            inner = f'"[" {inner} "]"'
        section = f"section: {self._mark(syntax.begin)} {inner} {self._mark(syntax.end)}"
        if must:
            return ["start: section", section]
        if self._special_id(syntax.begin) is not None:
            return ["start: TEXT section?", "TEXT: /(.|\\n)*/", section]
        return ["start: section | TEXT", "TEXT: /([^<](.|\\n)*)?/", section]

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
