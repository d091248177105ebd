"""One HTTP request on its way through the engine: its prompts, their merged stream, its usage and timings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from msgspec import UNSET

from octavo.api.generation import Generation, TextDelta
from octavo.api.openai.beams import Beams
from octavo.api.openai.context import Context
from octavo.api.openai.schema import PromptTokensDetails, SamplingFields, Usage
from octavo.errors import RequestError
from octavo.protocol.generate import Pooling, SamplingParams, Thinking

MAX_CHOICES = 2048  # of one request: prompts x n

Deltas = list[tuple[int, TextDelta]]  # choice, what it got


class Run:
    """Hands ``prompts`` (prepared ids and parameters) to the engine and follows their choices to the end.

    Choices are numbered as OpenAI does: those of the first prompt first. ``counts_output`` False leaves generated
    tokens out of the usage (a request that only scores its prompt). ``thinking`` is what the engine watches of each prompt. With ``pooling`` each
    prompt becomes a vector, and ``second_at`` says of each where the second text of its pair begins. Raises ``QueueFullError`` or ``EngineDeadError``
    at once, before anything is answered.
    """

    def __init__(
        self,
        context: Context,
        request: SamplingFields,
        prompts: Sequence[tuple[list[int], SamplingParams]],
        *,
        request_id: str,
        counts_output: bool = True,
        thinking: Sequence[Thinking | None] = (),
        pooling: Pooling | None = None,
        second_at: Sequence[int] = (),
    ) -> None:
        self.context = context
        self.prompts = prompts
        self.counts_output = counts_output
        self.n = prompts[0][1].n
        self.num_choices = len(prompts) * self.n
        if self.num_choices > MAX_CHOICES:
            raise RequestError(
                f"{len(prompts)} prompts with n={self.n} make {self.num_choices} choices; at most {MAX_CHOICES} are "
                "allowed in one request.",
                param="n" if len(prompts) == 1 else "prompt",
            )
        self.completion_tokens = [0] * self.num_choices
        self.cached_tokens = [0] * len(prompts)
        self.timer = context.start_timer(len(prompts), self.n, prompts[0][1].max_tokens)
        self.timer.about(request_id, prompts)
        self.wants_timings = bool(request.return_timings)
        terms = context.terms(request.deadline_ms, request.max_queue_ms)
        self.streams: list[Generation] = []
        self.beams: Beams | None = None
        if request.use_beam_search:
            self.beams = Beams(context, request, list(prompts), request_id)
            return
        try:
            for i, (ids, sampling) in enumerate(prompts):
                self.streams.append(
                    context.frontend.generate(
                        ids,
                        sampling,
                        request_id=request_id if len(prompts) == 1 else f"{request_id}-{i}",
                        priority=request.priority or 0,
                        cache_salt=context.caller.cache_salt(request.cache_salt),
                        thinking=thinking[i] if thinking else None,
                        pooling=pooling,
                        second_at=second_at[i] if second_at else 0,
                        terms=terms,
                    )
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Abort what still runs; safe to call twice."""
        self.timer.close()
        for stream in self.streams:
            stream.abort()

    async def deltas(self) -> AsyncGenerator[Deltas, None]:
        """All deltas that are there, whenever there are some; closing the generator aborts what still runs."""
        count = self._count
        try:
            if self.beams is not None:
                async with aclosing(self.beams.deltas()) as found:
                    async for batch in found:
                        yield [count(prompt, delta) for prompt, delta in batch]
                return
            if len(self.streams) == 1:  # the common case needs no tasks
                only = self.streams[0]
                async for delta in only:
                    yield [count(0, delta), *(count(0, more) for more in only.take_ready())]
                return
            async with aclosing(merge(self.streams)) as merged:
                async for batch in merged:
                    yield [count(prompt, delta) for prompt, delta in batch]
        finally:
            self.close()

    def usage(self) -> Usage:
        """Tokens so far; a prompt counts once, however many choices it has."""
        prompt_tokens = sum(len(ids) for ids, _ in self.prompts)
        completion_tokens = sum(self.completion_tokens) if self.counts_output else 0
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(sum(self.cached_tokens)),
            timings=self.timer.timings() if self.wants_timings else UNSET,
        )

    def _count(self, prompt: int, delta: TextDelta) -> tuple[int, TextDelta]:
        choice = prompt * self.n + delta.index
        num_tokens = len(delta.token_ids)
        self.completion_tokens[choice] += num_tokens
        if delta.times is not None:
            self.timer.times(delta.times)
        self.timer.delta(choice, num_tokens)
        if delta.num_cached_tokens:
            self.cached_tokens[prompt] = delta.num_cached_tokens
        if delta.finish_reason is not None:
            self.timer.finish(choice, delta.finish_reason, delta.num_prompt_tokens, delta.num_cached_tokens)
        return choice, delta


async def merge(streams: Sequence[Generation]) -> AsyncGenerator[Deltas, None]:
    """All streams as one: (stream index, delta) of everything that is there; the first error ends all."""
    queue: asyncio.Queue[tuple[int, list[TextDelta] | Exception | None]] = asyncio.Queue()

    async def pump(index: int) -> None:
        stream = streams[index]
        try:
            async for delta in stream:
                queue.put_nowait((index, [delta, *stream.take_ready()]))
            queue.put_nowait((index, None))
        except Exception as error:  # noqa: BLE001  the reader of the queue raises it
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(pump(i)) for i in range(len(streams))]
    try:
        num_open = len(streams)
        while num_open:
            batch: Deltas = []
            items = [await queue.get()]
            while not queue.empty():
                items.append(queue.get_nowait())
            for index, item in items:
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_open -= 1
                else:
                    batch += [(index, delta) for delta in item]
            if batch:
                yield batch
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
