"""Chat events as a response and its events, in the published order; whole replies and streams are both made here."""

from __future__ import annotations

from collections.abc import Callable

from octavo.api.chat.events import ChatEvent, Finish, Reasoning, Text, ToolArgs, ToolStart
from octavo.api.openai.logprobs import TokenNames, chat_logprobs
from octavo.api.openai.responses.items import new_id
from octavo.api.openai.responses.schema import (
    Event,
    Failure,
    FunctionCallItem,
    Incomplete,
    InputTokensDetails,
    OutputItem,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    ReasoningItem,
    ReasoningText,
    Response,
    Status,
    Usage,
)
from octavo.api.openai.schema import TokenLogprob
from octavo.protocol.generate import Logprob

Emit = Callable[[Event], None]


class ResponseWriter:
    """Fills ``response`` and tells ``emit`` every event, numbered from 0, when it is complete."""

    def __init__(self, response: Response, emit: Emit, names: TokenNames) -> None:
        self.response = response
        self._emit = emit
        self._names = names
        self._logprobs: list[TokenLogprob] = []  # of the open message
        self._number = 0
        self._item: OutputItem | None = None  # the open one
        self._parts: list[str] = []

    def start(self) -> None:
        """The response begins."""
        self._tell(Event(type="response.created", response=self.response))
        self.response.status = "in_progress"
        self._tell(Event(type="response.in_progress", response=self.response))

    def add(self, event: ChatEvent) -> None:
        """Go on by one event (all but ``Finish``)."""
        if isinstance(event, Text):
            if event.text:
                self._text(event.text, event.logprobs or [])
        elif isinstance(event, Reasoning):
            self._thought(event.text)
        elif isinstance(event, ToolStart):
            self._open(
                FunctionCallItem(
                    id=new_id("fc"), call_id=event.id, name=event.name, arguments="", status="in_progress"
                )
            )
        elif isinstance(event, ToolArgs):
            self._piece("response.function_call_arguments.delta", event.text)

    def finish(self, finish: Finish, num_reasoning_tokens: int) -> None:
        """The response is over."""
        response = self.response
        status: Status = "incomplete" if finish.reason == "length" else "completed"
        if not response.output:
            self._open_message()
        self._close(status)
        response.status = status
        if status == "incomplete":
            response.incomplete_details = Incomplete("max_output_tokens")
        response.usage = Usage(
            input_tokens=finish.num_prompt_tokens,
            input_tokens_details=InputTokensDetails(finish.num_cached_tokens),
            output_tokens=finish.num_generated_tokens,
            output_tokens_details=OutputTokensDetails(num_reasoning_tokens),
            total_tokens=finish.num_prompt_tokens + finish.num_generated_tokens,
        )
        self._tell(Event(type=f"response.{status}", response=response))

    def fail(self, message: str) -> None:
        """The response cannot be finished."""
        self._close("incomplete")
        self.response.status = "failed"
        self.response.error = Failure("server_error", message)
        self._tell(Event(type="response.failed", response=self.response))

    def cancel(self) -> None:
        """The client does not want the rest."""
        self._close("incomplete")
        self.response.status = "cancelled"

    def _tell(self, event: Event) -> None:
        event.sequence_number = self._number
        self._number += 1
        self._emit(event)

    def _text(self, text: str, rows: list[list[Logprob]]) -> None:
        if not isinstance(self._item, OutputMessage):
            self._open_message()
        told = chat_logprobs(self._names, rows, self.response.top_logprobs).content
        self._logprobs += told
        self._piece("response.output_text.delta", text, content_index=0, logprobs=told)

    def _open_message(self) -> None:
        self._open(OutputMessage(id=new_id("msg"), status="in_progress", content=[]))
        self._part("response.content_part.added", OutputText(text=""))

    def _thought(self, text: str) -> None:
        if not isinstance(self._item, ReasoningItem):
            self._open(ReasoningItem(id=new_id("rs"), content=[], status="in_progress"))
            self._part("response.content_part.added", ReasoningText(text=""))
        self._piece("response.reasoning_text.delta", text, content_index=0)

    @property
    def _place(self) -> int:
        return len(self.response.output) - 1

    def _open(self, item: OutputItem) -> None:
        self._close("completed")
        self._item, self._parts, self._logprobs = item, [], []
        self.response.output.append(item)
        self._tell(Event(type="response.output_item.added", output_index=self._place, item=item))

    def _piece(
        self,
        kind: str,
        text: str,
        content_index: int | None = None,
        logprobs: list[TokenLogprob] | None = None,
    ) -> None:
        self._parts.append(text)
        self._told(Event(type=kind, delta=text, content_index=content_index, logprobs=logprobs))

    def _part(self, kind: str, part: OutputText | ReasoningText) -> None:
        self._told(Event(type=kind, part=part, content_index=0))

    def _told(self, event: Event) -> None:
        """An event about the open item."""
        if self._item is not None:
            event.item_id, event.output_index = self._item.id, self._place
            self._tell(event)

    def _close(self, status: Status) -> None:
        item, text = self._item, "".join(self._parts)
        if item is None:
            return
        if isinstance(item, OutputMessage):
            told = self._logprobs
            item.content = [OutputText(text=text, logprobs=told)]
            self._told(Event(type="response.output_text.done", text=text, content_index=0, logprobs=told))
            self._part("response.content_part.done", item.content[0])
        elif isinstance(item, ReasoningItem):
            item.content = [ReasoningText(text=text)]
            self._told(Event(type="response.reasoning_text.done", text=text, content_index=0))
            self._part("response.content_part.done", item.content[0])
        else:
            item.arguments = text
            self._told(Event(type="response.function_call_arguments.done", arguments=text, name=item.name))
        item.status = status
        self._tell(Event(type="response.output_item.done", output_index=self._place, item=item))
        self._item = None
