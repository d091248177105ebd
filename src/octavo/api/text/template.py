"""Chat templates: jinja2 in a sandbox, the same output as Hugging Face's ``apply_chat_template``, and bounds on its work.

A template comes with the model file, so it is data from a stranger. It runs in jinja2's immutable sandbox (no attribute
with an underscore, no mutation of its input, no loader), and every loop pass, call and operator is counted (``Budget``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2

from octavo.api.text.messages import plain_messages
from octavo.api.text.template_sandbox import (
    MAX_SOURCE_CHARS,
    Budget,
    BudgetError,
    Environment,
    bounded_source,
)
from octavo.errors import ModelFileError, RequestError

# What a request may not set through chat_template_kwargs: the conversation itself and the tokens of the model.
RESERVED = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "tokenize",
        "return_dict",
        "raise_exception",
        "strftime_now",
        "bos_token",
        "eos_token",
        "unk_token",
        "pad_token",
        "sep_token",
        "cls_token",
        "mask_token",
    }
)


class ChatTemplate:
    """A model's chat template, compiled once.

    ``source`` is None for a model without one: rendering then raises ``RequestError`` with the cure. ``specials`` are
    the special tokens by name (bos_token, eos_token, ...). Raises ``ModelFileError`` for a template that is no jinja.
    """

    def __init__(self, source: str | None, specials: Mapping[str, str] | None = None) -> None:
        self.source = source
        self._specials = dict(specials or {})
        self._template: jinja2.Template | None = None
        if source is None:
            return
        if len(source) > MAX_SOURCE_CHARS:
            raise ModelFileError(
                f"The chat template has {len(source)} characters, at most {MAX_SOURCE_CHARS} are allowed.",
                "Use --chat-template FILE.",
            )
        environment = Environment({"tojson": _tojson})
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = bounded_source(environment, source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelFileError(
                f"The chat template is not valid: {_describe(error)}", "Use --chat-template FILE."
            ) from None

    def instead(self, source: str) -> ChatTemplate:
        """Another template for the same model; raises ``ModelFileError`` where ``source`` is no jinja."""
        return ChatTemplate(source, self._specials)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation; ``messages`` as in OpenAI's API (role, content, tool_calls, ...).

        ``kwargs`` are a request's chat_template_kwargs. Raises ``RequestError`` where they name a reserved variable,
        where the template refuses the conversation, and where it does more work than ``Budget`` allows.
        """
        if self._template is None:
            raise RequestError(
                "This model has no chat template.",
                param="messages",
                cure="Start the server with --chat-template FILE, or use /v1/completions.",
            )
        kwargs = kwargs or {}
        for name in kwargs:
            if name in RESERVED or name.startswith("_"):
                raise RequestError(
                    f"chat_template_kwargs may not set {name!r}.", param="chat_template_kwargs"
                )
        variables = {
            **self._specials,
            **kwargs,
            "messages": plain_messages(messages),
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        budget = Budget(variables)
        parts: list[str] = []
        try:
            for part in self._template.generate(**variables, **{Budget.VARIABLE: budget}):
                parts.append(part)
                budget.output(len(part))
        except BudgetError as error:
            raise RequestError(f"The chat template was stopped: {error}.", param="messages") from None
        except RefusedError as error:
            raise RequestError(
                f"The chat template refuses this conversation: {error}", param="messages"
            ) from None
        except Exception as error:  # noqa: BLE001  (a stranger's program: whatever it raises is about this request)
            raise RequestError(f"The chat template failed: {_describe(error)}", param="messages") from None
        return "".join(parts)


class RefusedError(jinja2.TemplateError):
    """``raise_exception`` was called by the template."""


def _raise_exception(message: object = "") -> None:
    raise RefusedError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja2's own filter escapes < > & ' for HTML, which a model was never trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _describe(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    line = getattr(error, "lineno", None)
    return (f"line {line}: " if line else "") + text[:500]
