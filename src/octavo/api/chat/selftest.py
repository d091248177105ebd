"""Does a model's text side hold together? Tokenizer, template, tool format and thinking markers, tried on themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from octavo.api.chat.formats.detect import detect_tools, read_last_call
from octavo.api.chat.formats.families import GENERIC
from octavo.api.chat.formats.reasoning import ReasoningParser
from octavo.api.chat.formats.tools import ToolSyntax
from octavo.api.chat.request import ChatPrompt, ChatRequest
from octavo.api.chat.thinking import ThinkingFormat
from octavo.api.text.template import ChatTemplate
from octavo.api.text.tokenizer import Tokenizer
from octavo.errors import OctavoError

SAMPLE = "Hello, wörld: 1,234.5 + x\n  def f(a): return a  # 你好 🙂"
ANSWER = "octavo answer"
PROBE, ARGUMENTS = "octavo_probe", {"city": "Łódź", "days": [1, 2]}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; a "note" is worth knowing, what is "wrong" needs mending."""

    subject: str
    text: str
    level: Literal["ok", "note", "wrong"] = "ok"


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> Iterator[Finding]:
    """Ids that the model has rows for, an end, specials that are one token, text that survives."""
    size = tokenizer.vocab_size
    if size > vocab_size:
        yield Finding(
            "tokenizer", f"{size} tokens, but the model has {vocab_size} rows of embeddings", "wrong"
        )
    else:
        yield Finding(
            "tokenizer",
            f"{size} tokens, {len(tokenizer.special_ids)} of them special; embeddings for {vocab_size}",
        )
    ends = sorted(tokenizer.eos_token_ids)
    beyond = [i for i in ends if i >= min(size, vocab_size)]
    if not ends:
        yield Finding("end of sequence", "none: answers stop only at their length", "wrong")
    elif beyond:
        yield Finding("end of sequence", f"ids {beyond} are outside the vocabulary", "wrong")
    else:
        yield Finding("end of sequence", ", ".join(f"{i} {tokenizer.token_text(i)!r}" for i in ends))
    split = [
        text
        for text in dict.fromkeys(tokenizer.special_tokens.values())
        if len(tokenizer.encode(text, add_special_tokens=False)) != 1
    ]
    if split:
        yield Finding("special tokens", f"written out, {', '.join(split)} become several tokens", "wrong")
    back = tokenizer.decode(tokenizer.encode(SAMPLE, add_special_tokens=False), skip_special_tokens=False)
    if back != SAMPLE:
        yield Finding("text and back", f"{SAMPLE!r} comes back as {back!r}", "note")


def check_template(template: ChatTemplate, tokenizer: Tokenizer) -> Iterator[Finding]:
    """A conversation can be rendered, and the turn ends with a token that ends the answer."""
    if template.source is None:
        yield Finding("chat template", "none: a base model, or --chat-template FILE is needed", "note")
        return
    prompt = ChatPrompt(tokenizer, template)
    user = {"role": "user", "content": "Hi"}
    try:
        ids = prompt.token_ids(ChatRequest(messages=[user]))
        turn = [user, {"role": "assistant", "content": ANSWER}, user]
        text = prompt.render(ChatRequest(messages=turn))
    except OctavoError as error:
        yield Finding("chat template", error.cause, "wrong")
        return
    yield Finding("chat template", f"a greeting becomes {len(ids)} tokens")
    if ANSWER not in text:
        yield Finding("turns", "the template drops what the assistant said", "wrong")
        return
    rest = tokenizer.encode(text[text.rindex(ANSWER) + len(ANSWER) :], add_special_tokens=False)
    ending = next((i for i in rest if i in tokenizer.special_ids or i in tokenizer.eos_token_ids), None)
    if ending is not None and ending not in tokenizer.eos_token_ids:
        shown = tokenizer.token_text(ending)
        yield Finding(
            "turns", f"{shown!r} follows an answer, but is no end of sequence: answers may run on", "wrong"
        )
    try:
        prompt.render(ChatRequest(messages=[{"role": "system", "content": "Be brief."}, user]))
    except OctavoError as error:
        yield Finding("system messages", error.cause, "note")


def check_tools(template: ChatTemplate, tokenizer: Tokenizer) -> Finding:
    """A call, rendered by the template (or explained in the prompt), is read back by the parser of the format."""
    if template.source is None:
        return Finding("tool calls", "no chat template, so none", "note")
    syntax = detect_tools(template)
    how = "explained in the prompt" if syntax is GENERIC else "the template's own"
    try:
        text = ChatPrompt(tokenizer, template).render(_call(syntax))
    except OctavoError as error:
        return Finding("tool calls", f"{syntax.name}: {error.cause}", "note")
    name, arguments = _read(text, syntax)
    if name == PROBE and arguments == ARGUMENTS:
        return Finding("tool calls", f"{syntax.name} ({how}): a call comes back as it was written")
    return Finding("tool calls", f"{syntax.name} ({how}): a call comes back as {name}({arguments})", "wrong")


def check_thinking(template: ChatTemplate, tokenizer: Tokenizer) -> Finding:
    """Thoughts between the markers are told from the answer."""
    format = ThinkingFormat.of(template, tokenizer)
    if format is None:
        return Finding("thinking", "no markers in the template")
    markers = format.markers
    parser = ReasoningParser(markers, 0, opened=False)
    events, answer = parser.push(f"{markers.start}thought{markers.end}answer")
    last, rest = parser.finish()
    thoughts = "".join(getattr(event, "text", "") for event in [*events, *last])
    what = f"{markers.start} {markers.end}"
    if (thoughts, answer + rest) != ("thought", "answer"):
        return Finding(
            "thinking",
            f"{what}: thoughts come back as {thoughts!r}, the answer as {answer + rest!r}",
            "wrong",
        )
    if format.ids is None:
        return Finding("thinking", f"{what}: no single tokens, so budgets cannot be kept", "note")
    return Finding("thinking", what)


def _call(syntax: ToolSyntax) -> ChatRequest:
    """A conversation with one call."""
    function = {"name": PROBE, "arguments": json.dumps(ARGUMENTS, ensure_ascii=False)}
    call = {"id": "probe0000"[: syntax.id_length or 9], "type": "function", "function": function}
    described = {"name": PROBE, "description": "A probe.", "parameters": {"type": "object", "properties": {}}}
    return ChatRequest(
        messages=[
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ],
        tools=[{"type": "function", "function": described}],
        add_generation_prompt=False,
        explain_tools=syntax is GENERIC,
    )


def _read(text: str, syntax: ToolSyntax) -> tuple[str | None, Any]:
    """Name and arguments of the last call in a text."""
    name, raw = read_last_call(text, syntax, PROBE)
    try:
        return name, json.loads(raw)
    except ValueError:
        return name, raw or None
