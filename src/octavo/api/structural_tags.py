"""Structural tags: free text in which every segment that begins with a trigger follows a schema to its end.

Both forms that are in use are read: ``structures`` with ``triggers``, and ``format`` with ``triggered_tags``, ``tag`` or
``json_schema``. The result is one Lark grammar.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from octavo.errors import RequestError

Text = Annotated[str, Meta(max_length=1024)]
Trigger = Annotated[str, Meta(min_length=1, max_length=1024)]
Schema = dict[str, Any] | bool


class Structure(msgspec.Struct, forbid_unknown_fields=True):
    """One kind of segment of the older form."""

    begin: Trigger
    schema: Schema
    end: Text = ""


class JsonContent(msgspec.Struct, forbid_unknown_fields=True, tag="json_schema"):
    """JSON that follows a schema."""

    json_schema: Schema


class TagFormat(msgspec.Struct, forbid_unknown_fields=True, tag="tag"):
    """A segment: its beginning, what is inside, its end."""

    begin: Trigger
    content: JsonContent
    end: Text = ""


class TriggeredTags(msgspec.Struct, forbid_unknown_fields=True, tag="triggered_tags"):
    """Free text with segments."""

    triggers: Annotated[list[Trigger], Meta(min_length=1, max_length=64)]
    tags: Annotated[list[TagFormat], Meta(min_length=1, max_length=256)]
    at_least_one: bool = False
    stop_after_first: bool = False


class Legacy(msgspec.Struct, forbid_unknown_fields=True):
    """The older form."""

    structures: Annotated[list[Structure], Meta(min_length=1, max_length=256)]
    triggers: Annotated[list[Trigger], Meta(min_length=1, max_length=64)]
    type: Literal["structural_tag"] = "structural_tag"


class Modern(msgspec.Struct, forbid_unknown_fields=True):
    """The newer form."""

    format: TriggeredTags | TagFormat | JsonContent
    type: Literal["structural_tag"] = "structural_tag"


def tag_grammar(value: str | dict[str, Any], param: str, prepare: Callable[[Any], dict[str, Any]]) -> str:
    """The Lark grammar of a structural tag, given as an object or as its text.

    ``prepare`` makes a schema of the request fit for the grammar. Raises ``RequestError`` that names what is wrong.
    """
    form = _read(value, param)
    if isinstance(form, Legacy):
        tags = [TagFormat(s.begin, JsonContent(s.schema), s.end) for s in form.structures]
        return _triggered(TriggeredTags(form.triggers, tags), param, prepare)
    if isinstance(form.format, TriggeredTags):
        return _triggered(form.format, param, prepare)
    if isinstance(form.format, TagFormat):
        return f"start: {_quoted(form.format.begin)} {_inside(form.format, prepare)}\n"
    return f"start: %json {json.dumps(prepare(form.format.json_schema), ensure_ascii=False)}\n"


def _read(value: str | dict[str, Any], param: str) -> Legacy | Modern:
    try:
        found = json.loads(value) if isinstance(value, str) else value
        if isinstance(found, dict) and "format" in found:
            return msgspec.convert(found, Modern)
        return msgspec.convert(found, Legacy)
    except (ValueError, RecursionError) as error:  # a ValidationError is a ValueError
        raise RequestError(f"{param}: the structural tag is not valid: {error}.", param=param) from None


def _triggered(tags: TriggeredTags, param: str, prepare: Callable[[Any], dict[str, Any]]) -> str:
    """Text up to a trigger is lazy: it ends where the first trigger appears, so that none can hide in it."""
    names = [f"tag_{i}" for i in range(len(tags.tags))]
    any_tag = "(" + " | ".join(names) + ")"
    if tags.stop_after_first:
        start = any_tag if tags.at_least_one else f"{any_tag} | text"
    else:
        start = f"{any_tag}{'+' if tags.at_least_one else '*'} text"
    lines = [f"start: {start}", "text: ANY", r"ANY: /(.|\n)*/"]
    by_trigger: dict[str, list[str]] = {}
    for name, tag in zip(names, tags.tags):
        fitting = [trigger for trigger in tags.triggers if tag.begin.startswith(trigger)]
        if not fitting:
            raise RequestError(
                f"{param}: the tag {tag.begin!r} begins with none of the triggers.", param=param
            )
        trigger = max(fitting, key=len)
        rest = tag.begin[len(trigger) :]
        by_trigger.setdefault(trigger, []).append(name)
        head = f"head_{list(by_trigger).index(trigger)}"
        lines.append(f"{name}: {head} {_quoted(rest)} {_inside(tag, prepare)}")
    for number, trigger in enumerate(by_trigger):
        lines.append(f"head_{number}[lazy]: ANY {_quoted(trigger)}")
    unused = [trigger for trigger in tags.triggers if trigger not in by_trigger]
    if unused:
        raise RequestError(f"{param}: no tag begins with the trigger {unused[0]!r}.", param=param)
    return "\n".join(lines) + "\n"


def _inside(tag: TagFormat, prepare: Callable[[Any], dict[str, Any]]) -> str:
    schema = json.dumps(prepare(tag.content.json_schema), ensure_ascii=False)
    return f"%json {schema} {_quoted(tag.end)}"


def _quoted(text: str) -> str:
    """A Lark string; nothing for the empty one."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f") if text else ""
