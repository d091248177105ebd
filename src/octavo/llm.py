"""Offline use: ``LLM(model).generate(prompts, SamplingParams)``; names and shapes are vLLM's.

The engine runs in the caller's own thread: ``generate`` submits, then steps ``EngineCore`` until every answer is whole.
"""

from __future__ import annotations

import itertools
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypedDict

import msgspec

from octavo import host
from octavo.api.beam import BeamSearch, candidates
from octavo.api.chat.request import ChatPrompt, ChatRequest
from octavo.api.frontend import Frontend
from octavo.api.generation import Choice, TextDelta
from octavo.api.text.tokenizer import Tokenizer
from octavo.config import EngineOptions
from octavo.engine.client.base import Sink
from octavo.errors import EngineDeadError, OctavoError, QueueFullError, RequestError, UsageError
from octavo.protocol.control import Control, ControlReply, EngineInfo, ResetPrefixCache
from octavo.protocol.generate import BeamSearchParams, GenerateRequest, SamplingParams, TokenDelta
from octavo.protocol.generate import Logprob as DrawnLogprob


class TokensPrompt(TypedDict):
    """A prompt as token ids."""

    prompt_token_ids: list[int]


class TextPrompt(TypedDict):
    """A prompt as text, in the dictionary form."""

    prompt: str


Prompt = str | list[int] | TokensPrompt | TextPrompt
Message = Mapping[str, Any]


@dataclass
class Logprob:
    """One candidate token: log probability, rank (1 = most likely), its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One answer. ``finish_reason`` is stop, length or abort; ``stop_reason`` the stop string or token id, if any.

    ``logprobs`` has for each token a dictionary from token id to ``Logprob``, the drawn token first.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """True once nothing more will be added."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """One prompt with its ``n`` answers. ``prompt_logprobs`` begins with None: nothing precedes the first token."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0


@dataclass
class BeamSearchSequence:
    """One beam: ``tokens`` and ``text`` begin with the prompt, ``cum_logprob`` counts what was generated."""

    tokens: list[int]
    cum_logprob: float
    text: str
    finish_reason: str | None = None


@dataclass
class BeamSearchOutput:
    """The beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]


@dataclass(frozen=True)
class StreamPiece:
    """What one step added to a streamed answer; the last piece carries the whole ``output``."""

    text: str
    num_tokens: int
    output: RequestOutput | None = None


class Core(Protocol):
    """What ``LLM`` needs of ``engine.core.EngineCore``."""

    info: EngineInfo

    def submit(self, request: GenerateRequest) -> None:
        """Queue a request."""

    def abort(self, ids: list[int]) -> None:
        """Stop requests."""

    def step(self) -> list[TokenDelta]:
        """Run one step."""

    def control(self, command: Control) -> ControlReply:
        """Ask or order something."""

    def close(self) -> None:
        """Free the device."""


class DirectClient:
    """An ``EngineClient`` without thread or process: whoever holds it calls ``pump`` to make the engine go on."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.info = core.info
        self.alive = True
        self._sinks: dict[int, Sink] = {}

    @property
    def busy(self) -> bool:
        """True while a request is open."""
        return bool(self._sinks)

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        """Queue a request; ``pump`` feeds its sink."""
        self.core.submit(request)
        self._sinks[request.id] = sink

    def abort(self, ids: list[int]) -> None:
        """Stop requests; they get no further delta."""
        known = [i for i in ids if self._sinks.pop(i, None) is not None]
        if known:
            self.core.abort(known)

    def pump(self) -> None:
        """Run one step and deliver what it brought; an engine that fails ends everything open."""
        try:
            deltas = self.core.step()
        except EngineDeadError:
            self.alive = False
            self._sinks.clear()
            raise
        for delta in deltas:
            sink = self._sinks.get(delta.id)
            if sink is None:
                continue
            if delta.finish_reason is not None:
                del self._sinks[delta.id]
            sink(delta)

    async def control(self, command: Control) -> ControlReply:
        """Ask or order something that is not a request."""
        return self.core.control(command)

    async def close(self) -> None:
        """Free the device."""
        self.shutdown()

    def shutdown(self) -> None:
        """``close`` for callers without an event loop; a second call does nothing."""
        if self.alive:
            self.alive = False
            self._sinks.clear()
            self.core.close()


class _Request:
    """One prompt on its way: collects the deltas of its choices into a ``RequestOutput``."""

    def __init__(self, llm: LLM, prompt: str | None, ids: list[int], sampling: SamplingParams) -> None:
        self.llm = llm
        self.sampling = sampling
        self.output = RequestOutput(
            llm._request_id(), prompt, ids, [CompletionOutput(index) for index in range(sampling.n)]
        )
        if sampling.prompt_logprobs is not None and len(ids) == 1:
            self.output.prompt_logprobs = [None]  # the engine has nothing to say about a lone first token
        self.fresh: list[TextDelta] = []
        self.open: dict[int, Choice] = {}
        self.keeps_rows = False  # as the engine gives them, without texts
        self.rows: list[list[DrawnLogprob]] = []
        self.leader: int | None = None  # the id of the choice that computes the prompt for all
        self.bad_words = llm.frontend.bad_words(sampling)
        self.error: str | None = None
        self.num_submitted = 0

    def submit(self) -> bool:
        """Hand the choices over; False when the engine's queue is full (call again after some steps)."""
        while self.num_submitted < self.sampling.n:
            index, sampling = self.num_submitted, self.sampling
            if sampling.n > 1:
                sampling = msgspec.structs.replace(sampling, n=1, seed=_derived_seed(sampling.seed, index))
            sampling, grammar = self.llm.frontend.grammars.split(sampling)
            request = GenerateRequest(
                id=next(self.llm._ids),
                prompt_token_ids=self.output.prompt_token_ids,
                sampling=sampling,
                grammar=grammar,
                bad_words=self.bad_words,
                leader=self.leader,
                eos_token_ids=list(self.llm.frontend.tokenizer.eos_token_ids),
                arrival_s=time.time(),
            )
            try:
                self.llm.client.submit(request, self.take)
            except QueueFullError:
                if not self.llm.client.busy:
                    raise
                return False
            self.leader = self.leader or request.id
            self.open[request.id] = Choice(index, request, self.llm.frontend.tokenizer)
            self.num_submitted += 1
        return True

    def take(self, delta: TokenDelta) -> None:
        """The sink of every choice."""
        choice = self.open.get(delta.id)
        if choice is None:
            return
        made = choice.text_delta(delta)
        answer = self.output.outputs[choice.index]
        answer.text += made.text
        answer.token_ids += made.token_ids
        if delta.logprobs is not None and self.keeps_rows:
            self.rows = delta.logprobs
        elif delta.logprobs is not None:
            self._add_logprobs(answer, delta.logprobs)
        if delta.prompt_logprobs is not None and self.output.prompt_logprobs is None:
            self.output.prompt_logprobs = [None, *(self._logprobs(row) for row in delta.prompt_logprobs)]
        self.output.num_cached_tokens = max(self.output.num_cached_tokens, made.num_cached_tokens)
        self.fresh.append(made)
        if delta.finish_reason == "error":
            self.error = delta.error or "the engine gave no reason"
            answer.finish_reason = "abort"
            del self.open[delta.id]
        elif made.finish_reason is not None:
            answer.finish_reason, answer.stop_reason = made.finish_reason, made.stop_reason
            del self.open[delta.id]
            if delta.finish_reason is None:  # a stop string: the engine does not know yet
                self.llm.client.abort([delta.id])
        self.output.finished = not self.open and self.num_submitted == self.sampling.n

    def abort(self) -> None:
        """Stop every choice that still runs."""
        self.llm.client.abort(list(self.open))
        self.open.clear()

    def _logprobs(self, row: list[DrawnLogprob]) -> dict[int, Logprob]:
        text = self.llm.frontend.tokenizer.token_text
        return {item.token_id: Logprob(item.logprob, item.rank, text(item.token_id)) for item in row}

    def _add_logprobs(self, answer: CompletionOutput, rows: list[list[DrawnLogprob]]) -> None:
        if answer.logprobs is None:
            answer.logprobs, answer.cumulative_logprob = [], 0.0
        for row in rows:
            answer.logprobs.append(self._logprobs(row))
            answer.cumulative_logprob = (answer.cumulative_logprob or 0.0) + row[0].logprob


class LLM:
    """A model, loaded and ready, in this process.

    ``options`` are the flags of ``octavo serve`` with underscores (``max_model_len=4096``, ``dtype="float32"``); a
    whole ``EngineOptions`` may be given instead of the name.
    Raises ``UsageError`` for an unknown option and ``ModelFileError`` for a model that cannot be read. Use it as a
    context manager or call ``close`` to free the device early.
    """

    def __init__(
        self,
        model: str | EngineOptions,
        *,
        progress: Callable[[str, int, int], None] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(model, str):
            self.options = EngineOptions.of(model=model, **options)
        elif options:
            raise UsageError("Give EngineOptions or single options, not both.")
        else:
            self.options = model
        self._ids = itertools.count(1)
        self._names = itertools.count()
        files = host.open_files(self.options, progress)
        tokenizer = host.tokenizer_ahead(self.options, files)
        self.client = DirectClient(host.build_core(self.options, files, progress))
        self.frontend: Frontend = host.build_frontend(self.options, files, self.client, tokenizer)

    @property
    def info(self) -> EngineInfo:
        """What was decided: context, type, pages, kernels, and how long the start took."""
        return self.client.info

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.frontend.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own sampling defaults (generation_config.json)."""
        return self.frontend.default_sampling()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue every prompt; one ``RequestOutput`` each, in order.

        A prompt is text, a list of token ids, ``{"prompt_token_ids": [...]}`` or ``{"prompt": text}``.
        ``sampling_params`` is one for all or one each; None takes the model's defaults. All prompts are checked before
        the first one runs: ``RequestError`` names what is wrong. Ctrl-C frees everything and leaves the LLM usable.
        """
        items: list[Prompt] = [prompts] if _is_single(prompts) else list(prompts)  # type: ignore[arg-type, list-item]
        requests = [self._prepare(*pair) for pair in zip(items, self._params(sampling_params, len(items)))]
        return self._run(requests, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or many; a message is ``{"role": ..., "content": ...}``."""
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Any = messages if several else [messages]
        prompts: list[Prompt] = [
            self.chat_prompt(
                one,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template_kwargs=chat_template_kwargs,
            )
            for one in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> TokensPrompt:
        """A conversation through the model's chat template, as token ids."""
        request = ChatRequest(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=dict(chat_template_kwargs or {}),
        )
        prompt = ChatPrompt(self.frontend.tokenizer, self.frontend.template)
        return {"prompt_token_ids": prompt.token_ids(request)}

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """The ``params.beam_width`` likeliest answers to every prompt, best first."""
        items: list[Prompt] = [prompts] if _is_single(prompts) else list(prompts)  # type: ignore[arg-type, list-item]
        asked = SamplingParams(max_tokens=params.max_tokens)
        prepared = [self._prepare(item, asked) for item in items]
        eos = self.frontend.tokenizer.eos_token_ids
        searches = [BeamSearch(params, eos, p.sampling.max_tokens or 1) for p in prepared]
        while any(search.beams for search in searches):
            asking = [
                _Request(self, None, [*p.output.prompt_token_ids, *beam.tokens], search.sampling)
                for p, search in zip(prepared, searches)
                for beam in search.beams
            ]
            for request in asking:
                request.keeps_rows = True
            self._run(asking, use_tqdm=False)
            rows = iter([candidates(request.rows) for request in asking])
            for search in searches:
                if search.beams:
                    search.advance([next(rows) for _ in search.beams])
        decode = self.frontend.tokenizer.decode
        return [
            BeamSearchOutput(
                [
                    BeamSearchSequence(
                        [*p.output.prompt_token_ids, *beam.tokens],
                        beam.logprob,
                        decode([*p.output.prompt_token_ids, *beam.tokens]),
                        beam.reason,
                    )
                    for beam in search.answers()
                ]
            )
            for p, search in zip(prepared, searches)
        ]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[StreamPiece, None, None]:
        """Continue one prompt and yield text as it comes; closing the iterator aborts. ``n`` must be 1."""
        request = self._prepare(prompt, sampling_params or self.get_default_sampling_params())
        if request.sampling.n != 1:
            raise RequestError("A stream has one answer: n must be 1.", param="n")
        request.submit()
        try:
            while not request.output.finished:
                self.client.pump()
                fresh, request.fresh = request.fresh, []
                for delta in fresh:
                    done = delta.finish_reason is not None
                    yield StreamPiece(delta.text, len(delta.token_ids), request.output if done else None)
                self._check(request)
        finally:
            request.abort()

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix."""
        self.client.core.control(ResetPrefixCache())

    def close(self) -> None:
        """Free the device; a second call does nothing."""
        self.client.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request_id(self) -> str:
        return str(next(self._names))

    def _params(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> Sequence[SamplingParams]:
        if given is None:
            return [self.get_default_sampling_params()] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise UsageError(f"There are {count} prompts but {len(given)} sampling_params.", "Give one each.")
        return given

    def _prepare(self, prompt: Prompt, sampling: SamplingParams) -> _Request:
        text: str | None = None
        if isinstance(prompt, Mapping):
            content: Any = prompt.get("prompt_token_ids", prompt.get("prompt"))
            if content is None:
                raise RequestError("A prompt dictionary needs prompt_token_ids or prompt.", param="prompt")
        else:
            content = prompt
        if isinstance(content, str):
            text = content
        ids, sampling = self.frontend.prepare(content, sampling)
        return _Request(self, text, ids, sampling)

    def _run(self, requests: list[_Request], use_tqdm: bool) -> list[RequestOutput]:
        waiting = deque(requests)
        with deferred_interrupt() as interrupted, _progress(len(requests), use_tqdm) as tick:
            try:
                while waiting or self.client.busy:
                    while waiting and waiting[0].submit():
                        waiting.popleft()
                    self.client.pump()
                    if interrupted():
                        raise KeyboardInterrupt
                    tick(requests)
            except BaseException:
                for request in requests:
                    request.abort()
                raise
        for request in requests:
            self._check(request)
        return [request.output for request in requests]

    def _check(self, request: _Request) -> None:
        if request.error is not None:
            raise OctavoError(f"Request {request.output.request_id} failed: {request.error}")


def _derived_seed(seed: int | None, index: int) -> int | None:
    """The seed of choice ``index``: counts on from ``seed`` within 64-bit integers, as the server does."""
    return None if seed is None else (seed + index + 2**63) % 2**64 - 2**63


def _is_single(prompts: Any) -> bool:
    """True for one prompt, False for a list of them; a list of ints is one prompt."""
    if isinstance(prompts, str | Mapping):
        return True
    return bool(prompts) and all(isinstance(item, int) for item in prompts)


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back: yields a function that says whether it was pressed. A second one interrupts at once.

    An interrupt in the middle of a step would leave pages half booked; between steps it is harmless.
    """
    pressed = False

    def handle(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress(total: int, wanted: bool) -> Iterator[Callable[[list[_Request]], None]]:
    """A progress bar on a terminal; otherwise a function that does nothing."""
    if not wanted or not sys.stderr.isatty():
        yield lambda requests: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=False) as bar:
        task = bar.add_task("Processed prompts", total=total)
        shown = time.monotonic()

        def tick(requests: list[_Request]) -> None:
            nonlocal shown
            now = time.monotonic()
            done = all(request.output.finished for request in requests)
            if now - shown < 0.1 and not done:
                return
            shown = now
            tokens = sum(len(answer.token_ids) for request in requests for answer in request.output.outputs)
            finished = sum(request.output.finished for request in requests)
            bar.update(task, completed=finished, description=f"{tokens} tokens")

        yield tick
