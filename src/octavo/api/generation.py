"""One request on its way back: engine deltas become text as they arrive and wait for whoever reads the stream."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Literal

import msgspec

from octavo.api.text.detokenizer import Detokenizer
from octavo.api.text.stop_strings import StopMatcher
from octavo.api.text.tokenizer import Tokenizer
from octavo.engine.client.base import EngineClient
from octavo.errors import EngineDeadError, OctavoError, QueueFullError, RequestError
from octavo.protocol.generate import GenerateRequest, Logprob, Times, TokenDelta


class TextDelta(msgspec.Struct, gc=False):
    """What one engine step added to one choice of a request.

    ``text`` may be empty while a character or a possible stop string is incomplete. ``stop_reason`` is the stop string,
    or the token id out of ``stop_token_ids``, that ended it; None for an end-of-sequence token.
    ``logprobs`` has one list a token in ``token_ids`` (the drawn token first); ``prompt_logprobs`` and ``times`` come once.
    ``embedding`` is the vector of a pooling request.
    """

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length", "repetition", "abort", "deadline"] | None = None
    stop_reason: str | int | None = None
    logprobs: list[list[Logprob]] | None = None
    prompt_logprobs: list[list[Logprob]] | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    index: int = 0
    times: Times | None = None
    embedding: bytes | None = None


class Choice:
    """The state of one choice: its detokenizer, its stop strings, how many tokens it has."""

    def __init__(self, index: int, request: GenerateRequest, tokenizer: Tokenizer) -> None:
        sampling = request.sampling
        self.index = index
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self._detokenizer = (
            Detokenizer(tokenizer, sampling.skip_special_tokens, request.prompt_token_ids)
            if sampling.detokenize
            else None
        )
        stops = sampling.stop_strings
        self._include_stop = sampling.include_stop_str_in_output
        self._matcher = StopMatcher(stops, self._include_stop) if stops else None
        self._min_tokens = sampling.min_tokens
        self._num_tokens = 0
        self._stop_token_ids = frozenset(sampling.stop_token_ids)
        self._eos_token_ids = frozenset() if sampling.ignore_eos else frozenset(request.eos_token_ids)
        self._num_cached_tokens = 0

    def text_delta(self, delta: TokenDelta) -> TextDelta:
        """The engine's delta as text; a stop string found here finishes the choice."""
        self._num_cached_tokens = max(self._num_cached_tokens, delta.num_cached_tokens)
        reason = delta.finish_reason
        made = TextDelta(
            "",
            delta.tokens,
            None if reason == "error" or reason == "rejected" or reason == "unsatisfiable" else reason,
            None,
            delta.logprobs,
            delta.prompt_logprobs,
            self.num_prompt_tokens,
            self._num_cached_tokens,
            self.index,
            delta.times,
            delta.embedding,
        )
        if reason == "stop" and self._is_asked_stop(delta.stop_token):
            made.stop_reason = delta.stop_token
        if reason == "repetition":
            made.stop_reason = "repetition_detected"
        if self._detokenizer is not None:
            made.text, stop = self._text(self._detokenizer, delta)
            if stop is not None:
                made.finish_reason, made.stop_reason = "stop", stop
        return made

    def _is_asked_stop(self, token: int | None) -> bool:
        return token is not None and token in self._stop_token_ids and token not in self._eos_token_ids

    def _text(self, detokenizer: Detokenizer, delta: TokenDelta) -> tuple[str, str | None]:
        tokens, before = delta.tokens, self._num_tokens
        self._num_tokens += len(tokens)
        if delta.stop_token is not None and tokens and not self._include_stop:
            tokens = tokens[:-1]  # the token that ended the answer is not part of its text
        free = 0
        if self._matcher is not None and before < self._min_tokens:
            free = min(self._min_tokens - before, len(tokens))  # these tokens may not stop the answer
        text = detokenizer.push(tokens[:free] if free else tokens)
        if self._matcher is None:
            return (text + detokenizer.flush() if delta.finish_reason else text), None
        shown = text if free else ""
        text = detokenizer.push(tokens[free:]) if free else text
        if delta.finish_reason:
            text += detokenizer.flush()
        safe, stop = self._matcher.push(text)
        if delta.finish_reason and stop is None:
            safe += self._matcher.flush()
        return shown + safe, stop


class _Mailbox:
    """Deltas between the engine's sinks and the reader; the reader's handle is not known here, so dropping it frees it."""

    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self.ready: deque[TextDelta] = deque()
        self.open: dict[int, Choice] = {}
        self.error: OctavoError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def deliver(self, delta: TokenDelta) -> None:
        """The sink of every choice: called by the client once a step, on the event loop's thread."""
        choice = self.open.get(delta.id)
        if choice is None:  # aborted or finished by a stop string while this delta was under way
            return
        made = choice.text_delta(delta)
        if delta.finish_reason is not None:
            del self.open[delta.id]
            if delta.finish_reason == "error":
                self.fail(delta.error or "The engine could not finish this request.")
                return
            if delta.finish_reason == "unsatisfiable":
                self.error = RequestError(delta.error or "What the request allows leaves no token.")
                self.abort()
                return
            if delta.finish_reason == "rejected":
                self.error = QueueFullError(delta.error or "The request waited too long.")
                self.abort()
                return
        elif made.finish_reason is not None:
            del self.open[delta.id]
            self.client.abort([delta.id])
        self.ready.append(made)
        self.wake()

    def fail(self, cause: str) -> None:
        """Give up on the whole request: its reader gets the error after what is ready."""
        self.error = OctavoError(cause) if self.client.alive else EngineDeadError(cause)
        self.abort()

    def abort(self) -> None:
        """Stop what still runs in the engine and wake the reader."""
        ids = list(self.open)
        self.open.clear()
        if ids:
            self.client.abort(ids)
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Until something is ready or nothing more can come."""
        while not self.ready and self.open:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None


class Generation:
    """The stream of one request: an asynchronous iterator of ``TextDelta`` for one reader.

    ``aclose``, cancelling the reader while it waits, or dropping the object aborts what still runs in the engine.
    Iteration raises ``EngineDeadError`` when the engine died and ``OctavoError`` when it gave this request up.
    """

    def __init__(self, client: EngineClient, request_id: str) -> None:
        self.request_id = request_id
        self._mailbox = _Mailbox(client)

    def submit(self, request: GenerateRequest, choice: Choice) -> None:
        """Queue one choice; its deltas arrive in this stream."""
        self._mailbox.open[request.id] = choice
        try:
            self._mailbox.client.submit(request, self._mailbox.deliver)
        except BaseException:
            del self._mailbox.open[request.id]
            raise

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> TextDelta:
        mailbox = self._mailbox
        if not mailbox.ready:
            try:
                await mailbox.wait()
            except BaseException:
                mailbox.abort()
                raise
            if not mailbox.ready:
                if mailbox.error is not None:
                    raise mailbox.error
                raise StopAsyncIteration
        return mailbox.ready.popleft()

    def take_ready(self) -> list[TextDelta]:
        """Every further delta that is there already, without waiting (to write them out in one go)."""
        taken = list(self._mailbox.ready)
        self._mailbox.ready.clear()
        return taken

    def abort(self) -> None:
        """Stop what still runs; the stream then ends."""
        self._mailbox.abort()

    async def aclose(self) -> None:
        """``abort``, for ``contextlib.aclosing``."""
        self._mailbox.abort()

    def __del__(self) -> None:
        mailbox = getattr(self, "_mailbox", None)
        if mailbox is not None and mailbox.open and mailbox.client.alive:
            mailbox.abort()
