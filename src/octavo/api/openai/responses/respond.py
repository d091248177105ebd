"""``/v1/responses``: create (whole, streamed, in the background), get, cancel, delete, list the input."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import msgspec

from octavo.api.chat.events import Finish
from octavo.api.openai.context import Context, Stream, StreamForm
from octavo.api.openai.conversation import Conversation, count_prompt, renamed, start_chat
from octavo.api.openai.logprobs import TokenNames
from octavo.api.openai.responses.items import (
    LOGPROBS,
    NAMES,
    chat_request,
    input_items,
    new_id,
    output_turns,
    turns_of,
)
from octavo.api.openai.responses.keeper import ResponseKeeper
from octavo.api.openai.responses.schema import (
    Deleted,
    Event,
    InputTokens,
    InputTokensRequest,
    ItemList,
    Reasoning,
    Response,
    ResponsesRequest,
    TextConfig,
    TextFormat,
)
from octavo.api.openai.responses.store import Kept
from octavo.api.openai.responses.writer import ResponseWriter
from octavo.errors import OctavoError, RequestError

log = logging.getLogger("octavo.server")

FORM = StreamForm(done=b"", error_head=b"event: error\ndata: ")
# Thoughts are in the clear, which serves the end of the first.
SERVED_INCLUDES = {"reasoning.encrypted_content", LOGPROBS}
MAX_LISTED = 100
FAILED = "The engine could not finish this response; the server's log has the cause."


class Responses:
    """The routes over one served model and one store; ``owner`` is whose responses they are."""

    def __init__(self, context: Context, store: ResponseKeeper) -> None:
        self._context = context
        self._store = store

    async def create(self, owner: str, body: ResponsesRequest) -> Response | Stream:
        """Answer; with ``background`` at once, while the answer is still being made."""
        _check(body)
        if body.background:
            await self._store.check_running(owner)
        items = input_items(body.input)
        now = turns_of(items)
        earlier = await self._earlier(owner, body.previous_response_id)
        response_id = f"resp_{body.request_id}" if body.request_id else new_id("resp")
        turns = await self._fitting(body, earlier, now)
        with renamed(NAMES):
            chat = await start_chat(self._context, chat_request(body, turns, ()), "resp_")
        response = self._begun(body, chat, response_id)
        kept = Kept(response, items)
        keep = partial(self._store.keep, owner, kept) if body.store is not False else _forget
        answer = _Answer(chat, kept, [*earlier, *now], keep)
        if body.stream:
            return Stream(answer.stream(), chat.run.close, FORM)
        if body.background:
            kept.stop = answer.cancel
            response.status = "queued"
            await answer.keep()
            kept.task = asyncio.create_task(answer.run_alone())
            return response
        await answer.run()
        if answer.error is not None:
            raise answer.error
        return response

    async def count(self, owner: str, body: InputTokensRequest) -> InputTokens:
        """How many tokens the prompt of such a request has."""
        earlier = await self._earlier(owner, body.previous_response_id)
        turns = await self._fitting(body, earlier, turns_of(input_items(body.input)))
        with renamed(NAMES):
            return InputTokens(input_tokens=await count_prompt(self._context, chat_request(body, turns, ())))

    async def get(self, owner: str, response_id: str) -> Response:
        """A response that is kept."""
        return (await self._store.fetch(owner, response_id)).response

    async def cancel(self, owner: str, response_id: str) -> Response:
        """End a response that runs in the background; one that is over stays as it is."""
        return await self._store.cancel(owner, response_id)

    async def delete(self, owner: str, response_id: str) -> Deleted:
        """Forget a response."""
        await self._store.forget(owner, response_id)
        return Deleted(id=response_id)

    async def list_input(self, owner: str, response_id: str, query: Mapping[str, str]) -> ItemList:
        """The items of a response's request, in the order and number that ``query`` asks for."""
        items = (await self._store.fetch(owner, response_id)).items
        limit, order, after = query.get("limit", "20"), query.get("order", "desc"), query.get("after")
        if not limit.isdigit() or not 1 <= int(limit[:9]) <= MAX_LISTED:
            raise RequestError(f"limit must be from 1 to {MAX_LISTED}.", param="limit")
        if order not in ("asc", "desc"):
            raise RequestError("order must be asc or desc.", param="order")
        listed = list(items if order == "asc" else reversed(items))
        if after is not None:
            ids = [item["id"] for item in listed]
            if after not in ids:
                raise RequestError(f"after names {after!r}, which is no item.", param="after")
            listed = listed[ids.index(after) + 1 :]
        page = listed[: int(limit)]
        return ItemList(
            data=page,
            first_id=page[0]["id"] if page else None,
            last_id=page[-1]["id"] if page else None,
            has_more=len(listed) > len(page),
        )

    async def _earlier(self, owner: str, response_id: str | None) -> Sequence[Mapping[str, Any]]:
        if response_id is None:
            return ()
        kept = await self._store.fetch(owner, response_id)
        if kept.response.status not in ("completed", "incomplete"):
            raise RequestError(
                f"The response {response_id!r} is {kept.response.status}; it cannot be gone on from.",
                param="previous_response_id",
            )
        return kept.turns

    async def _fitting(
        self, body: InputTokensRequest, earlier: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
    ) -> list[Mapping[str, Any]]:
        """All turns; with ``truncation: auto`` without so many of the oldest that the rest fits the context.

        What is kept begins with a turn of the user, so that no output of a tool stands without its call.
        """
        turns = [*earlier, *now]
        if body.truncation != "auto":
            return turns
        most = self._context.info.max_model_len - 1
        starts = [0] + [i for i, turn in enumerate(turns) if i and turn["role"] == "user"]
        low, high = 0, len(starts) - 1
        while low < high:  # the first start whose rest fits; the last one must do in any case
            middle = (low + high) // 2
            with renamed(NAMES):
                count = await count_prompt(self._context, chat_request(body, turns[starts[middle] :], ()))
            low, high = (low, middle) if count <= most else (middle + 1, high)
        return turns[starts[low] :]

    def _begun(self, body: ResponsesRequest, chat: Conversation, response_id: str) -> Response:
        """The response before its first item."""
        sampling = chat.run.prompts[0][1]
        return Response(
            id=response_id,
            created_at=chat.created,
            status="in_progress",
            background=bool(body.background),
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            max_tool_calls=body.max_tool_calls,
            metadata=body.metadata or {},
            model=chat.model,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=body.previous_response_id,
            reasoning=body.reasoning or Reasoning(),
            store=body.store is not False,
            temperature=sampling.temperature,
            text=body.text or TextConfig(format=TextFormat()),
            tool_choice=body.tool_choice or "auto",
            tools=body.tools or [],
            top_logprobs=body.top_logprobs or 0,
            top_p=sampling.top_p,
            truncation=body.truncation or "disabled",
            user=body.user,
        )


def _check(body: ResponsesRequest) -> None:
    unknown = set(body.include or []) - SERVED_INCLUDES
    if unknown:
        raise RequestError(f"include {min(unknown)!r} is not supported.", param="include")
    if body.background and body.store is False:
        raise RequestError("background needs store: true.", param="background")
    if body.background and body.stream:
        raise RequestError("background and stream exclude each other here.", param="background")


async def _forget() -> None:
    """A response that nobody may ask for again."""


class _Answer:
    """One response being made; ``keep`` stores what there is of it."""

    def __init__(
        self,
        chat: Conversation,
        kept: Kept,
        turns: list[Mapping[str, Any]],
        keep: Callable[[], Awaitable[None]],
    ) -> None:
        self.chat = chat
        self.keep = keep
        self.kept = kept
        self.turns = turns
        self.error: Exception | None = None
        self.events = bytearray()
        names = TokenNames(chat.context.frontend.tokenizer, as_ids=False)
        self.writer = ResponseWriter(kept.response, self._encode, names)

    def _encode(self, event: Event) -> None:
        if self.chat.request.stream:
            head = f"event: {event.type}\ndata: ".encode()
            self.events += head + msgspec.json.encode(event) + b"\n\n"

    async def run(self) -> None:
        """Make it without telling anybody; errors are kept in ``error`` and in the response."""
        async with aclosing(self.stream()) as events:
            async for _ in events:
                pass

    async def run_alone(self) -> None:
        """``run`` in the background, where nobody would hear of an error."""
        try:
            await self.run()
        except Exception as error:  # noqa: BLE001  whatever it is, it ends this response and no other
            await self._fail(error)

    async def _fail(self, error: Exception) -> None:
        response = self.kept.response
        log.error("response %s failed: %s", response.id, error)
        self.kept.stop = None
        self.writer.fail(FAILED)
        await self.keep()

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The events, as they come; an error before the first is raised."""
        writer, begun = self.writer, False
        try:
            async with aclosing(self.chat.events()) as batches:
                async for batch in batches:
                    if not begun:
                        begun = True
                        writer.start()
                        if self.kept.stop is not None:  # in the background: others may look
                            await self.keep()
                    for event in batch:
                        if isinstance(event, Finish):
                            await self._finish(event)
                        else:
                            writer.add(event)
                    if self.events:
                        yield bytes(self.events)
                        self.events.clear()
        except OctavoError as error:
            self.error = error
            if not begun:
                raise
            await self._fail(error)
            yield bytes(self.events)

    async def _finish(self, finish: Finish) -> None:
        if self.kept.response.status == "cancelled":
            return
        reader = self.chat.readers[0] if self.chat.readers else None
        self.writer.finish(finish, 0 if reader is None else reader.num_reasoning_tokens)
        self.kept.turns = [*self.turns, *output_turns(self.kept.response.output)]
        self.kept.stop = None
        await self.keep()  # before the client hears of the end: it may go on from here at once

    def cancel(self) -> None:
        """End it where it is."""
        self.kept.stop = None
        self.writer.cancel()
        self.chat.run.close()
