"""Offline use: ``LLM(model).generate(prompts, SamplingParams)``; names and shapes are vLLM's.

The engine runs in the caller's own thread: ``generate`` submits, then steps ``EngineCore`` until every answer is whole.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Self, TypedDict

import msgspec

from octavo import host
from octavo.api.beam import BeamSearch, candidates
from octavo.api.chat.request import ChatPrompt, ChatRequest
from octavo.api.frontend import Frontend
from octavo.api.generation import Choice, TextDelta
from octavo.api.text.tokenizer import Tokenizer
from octavo.config import EngineOptions
from octavo.errors import OctavoError, QueueFullError, RequestError, UsageError
from octavo.llm.client import DirectClient as DirectClient
from octavo.llm.outputs import BeamSearchOutput as BeamSearchOutput
from octavo.llm.outputs import BeamSearchSequence as BeamSearchSequence
from octavo.llm.outputs import ClassificationRequestOutput as ClassificationRequestOutput
from octavo.llm.outputs import CompletionOutput as CompletionOutput
from octavo.llm.outputs import EmbeddingRequestOutput as EmbeddingRequestOutput
from octavo.llm.outputs import Logprob as Logprob
from octavo.llm.outputs import PoolingRequestOutput as PoolingRequestOutput
from octavo.llm.outputs import RequestOutput as RequestOutput
from octavo.llm.outputs import ScoringRequestOutput as ScoringRequestOutput
from octavo.llm.outputs import StreamPiece as StreamPiece
from octavo.llm.pooling import PoolingRuns, Task, Text
from octavo.llm.running import deferred_interrupt as deferred_interrupt
from octavo.llm.running import progress
from octavo.protocol.control import EngineInfo, ResetPrefixCache
from octavo.protocol.generate import (
    BeamSearchParams,
    GenerateRequest,
    PoolingParams,
    SamplingParams,
    TokenDelta,
)
from octavo.protocol.generate import Logprob as DrawnLogprob


class TokensPrompt(TypedDict):
    """A prompt as token ids."""

    prompt_token_ids: list[int]


class TextPrompt(TypedDict):
    """A prompt as text, in the dictionary form."""

    prompt: str


Prompt = str | list[int] | TokensPrompt | TextPrompt
Message = Mapping[str, Any]


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
        self.bad_words, self.dry = llm.frontend.bad_words(sampling), llm.frontend.dry(sampling)
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
                dry=self.dry,
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
        if delta.finish_reason in ("error", "unsatisfiable"):
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
        self._pooling = PoolingRuns(self.client, self.frontend, self._ids, self._request_id)

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

    def embed(
        self,
        prompts: Text | Sequence[Text],
        *,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """The vector of every text; the model must be an encoder or loaded with ``runner="pooling"``."""
        return self._pooling.embed(prompts, pooling_params or PoolingParams(), use_tqdm)

    def classify(
        self,
        prompts: Text | Sequence[Text],
        *,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | None = None,
    ) -> list[ClassificationRequestOutput]:
        """How likely each of the model's labels is for every text; the model must have a classification head."""
        return self._pooling.classify(prompts, pooling_params or PoolingParams(), use_tqdm)

    def encode(
        self,
        prompts: Text | Sequence[Text],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: bool = True,
        pooling_task: Task | None = None,
    ) -> list[PoolingRequestOutput]:
        """What the task ("embed", "classify"; None: what the model is made for) makes of every text."""
        return self._pooling.encode(prompts, pooling_task, pooling_params or PoolingParams(), use_tqdm)

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        /,
        *,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | None = None,
    ) -> list[ScoringRequestOutput]:
        """How well pairs of texts fit; a single first text is paired with all second ones.

        A cross-encoder reads each pair together; of any other model the cosine of both vectors is taken.
        """
        return self._pooling.score(data_1, data_2, pooling_params or PoolingParams(), use_tqdm)

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

        def count() -> tuple[int, int]:
            tokens = sum(len(answer.token_ids) for request in requests for answer in request.output.outputs)
            return sum(request.output.finished for request in requests), tokens

        with deferred_interrupt() as interrupted, progress(len(requests), use_tqdm) as tick:
            try:
                while waiting or self.client.busy:
                    while waiting and waiting[0].submit():
                        waiting.popleft()
                    self.client.pump()
                    if interrupted():
                        raise KeyboardInterrupt
                    tick(count)
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
