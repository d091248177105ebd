"""Chat templates that requests bring: code of a stranger, so refused unless the server was told to trust its clients."""

from __future__ import annotations

import asyncio

from octavo.api.text.template import ChatTemplate
from octavo.errors import ModelFileError, RequestError

MAX_KEPT = 16  # compiled templates


class GivenTemplates:
    """Compiles what requests bring in place of ``own``, the model's template, and keeps the latest."""

    def __init__(self, own: ChatTemplate, *, trusted: bool) -> None:
        self.own = own
        self.trusted = trusted
        self._kept: dict[str, ChatTemplate] = {}

    async def choose(self, source: str | None) -> ChatTemplate:
        """The template of a request that brings ``source`` (None: the model's own); ``RequestError`` names the field."""
        if source is None:
            return self.own
        if not self.trusted:
            raise RequestError(
                "This server takes no chat_template from requests.",
                param="chat_template",
                cure="Remove the field, or start the server with --trust-request-chat-template.",
            )
        template = self._kept.pop(source, None)
        if template is None:
            try:
                template = await asyncio.to_thread(self.own.instead, source)
            except ModelFileError as error:
                raise RequestError(error.cause, param="chat_template") from None
        self._kept[source] = template
        if len(self._kept) > MAX_KEPT:
            del self._kept[next(iter(self._kept))]
        return template
