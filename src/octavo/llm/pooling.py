"""``LLM.embed``, ``classify``, ``encode`` and ``score``: texts through the engine in the caller's thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np

from octavo.api.frontend import Frontend, check_token_ids
from octavo.api.vectors import ONE_TOKEN, Cutting, Vectors, fitting, probabilities, shortened, unit
from octavo.errors import OctavoError, QueueFullError, RequestError
from octavo.llm.client import DirectClient
from octavo.llm.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PooledRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from octavo.llm.running import deferred_interrupt, progress
from octavo.protocol.generate import GenerateRequest, Pooling, PoolingParams, TokenDelta

Text = str | list[int] | Mapping[str, Any]  # a text, token ids, or a dictionary of either as for ``generate``
Task = Literal["embed", "classify"]
Out = TypeVar("Out")


@dataclass
class _Read:
    """One text on its way."""

    ids: list[int]
    second_at: int = 0
    id: int = -1
    delta: TokenDelta | None = None


@dataclass
class PoolingRuns:
    """``numbers`` are the ids that the engine knows requests by, ``name`` makes those that callers see."""

    client: DirectClient
    frontend: Frontend
    numbers: Iterator[int]
    name: Callable[[], str]
    open: dict[int, _Read] = field(default_factory=dict)

    def embed(
        self, prompts: Text | Sequence[Text], params: PoolingParams, use_tqdm: bool
    ) -> list[EmbeddingRequestOutput]:
        """See ``LLM.embed``."""
        reads = self._reads(prompts, params)
        made = self._vectors(reads, params, use_tqdm)
        return [self._output(read, EmbeddingOutput(row.tolist())) for read, row in zip(reads, made)]

    def classify(
        self, prompts: Text | Sequence[Text], params: PoolingParams, use_tqdm: bool
    ) -> list[ClassificationRequestOutput]:
        """See ``LLM.classify``."""
        reads = self._reads(prompts, params)
        made = self._classes(reads, params, use_tqdm)
        return [self._output(read, ClassificationOutput(row.tolist())) for read, row in zip(reads, made)]

    def encode(
        self, prompts: Text | Sequence[Text], task: Task | None, params: PoolingParams, use_tqdm: bool
    ) -> list[PoolingRequestOutput]:
        """See ``LLM.encode``."""
        if task not in (None, "embed", "classify"):
            raise RequestError(
                f'pooling_task must be "embed" or "classify", got {task!r}.', param="pooling_task"
            )
        if task is None:
            task = "classify" if self.client.info.facts.labels else "embed"
        reads = self._reads(prompts, params)
        made = (self._classes if task == "classify" else self._vectors)(reads, params, use_tqdm)
        return [self._output(read, PoolingOutput(row.tolist())) for read, row in zip(reads, made)]

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        params: PoolingParams,
        use_tqdm: bool,
    ) -> list[ScoringRequestOutput]:
        """See ``LLM.score``."""
        left, right = ([side] if isinstance(side, str) else list(side) for side in (data_1, data_2))
        if len(left) not in (1, len(right)) or not right:
            raise RequestError(
                f"{len(left)} and {len(right)} texts make no pairs: give one first text, or as many as second ones.",
                param="data_1",
            )
        if params.dimensions is not None:
            raise RequestError("dimensions is of vectors, not of scores.", param="dimensions")
        labels = self.client.info.facts.labels
        if not labels:
            reads = self._reads([*left, *right], params)
            if params.use_activation is False:
                raise RequestError("Scores of this model are cosines.", param="use_activation")
            made = unit(self._run(reads, self.client.info.facts.pooling, use_tqdm))
            scores = (made[: len(left)] * made[len(left) :]).sum(axis=1)
            return [
                self._output(read, ScoringOutput(float(x))) for read, x in zip(reads[len(left) :], scores)
            ]
        if len(labels) != 1:
            raise RequestError(
                f"The model tells {len(labels)} classes apart, which makes no score.",
                cure="Use LLM.classify.",
            )
        cutting, reads = Cutting(params.truncate_prompt_tokens), []
        for i, (first, second) in enumerate(zip(left * len(right) if len(left) == 1 else left, right)):
            ids, at = self.frontend.tokenizer.encode_pair(first, second)
            ids = fitting(self.frontend, ids, f"data_2[{i}]", cutting)
            reads.append(_Read(ids, at if at < len(ids) else 0))
        made = self._classes(reads, params, use_tqdm)
        return [self._output(read, ScoringOutput(float(row[0]))) for read, row in zip(reads, made)]

    def _reads(self, prompts: Text | Sequence[Text], params: PoolingParams) -> list[_Read]:
        """Every text as checked tokens, before the first one runs."""
        cutting = Cutting(params.truncate_prompt_tokens)
        single = isinstance(prompts, str | Mapping) or (
            bool(prompts) and all(isinstance(item, int) for item in prompts)
        )
        texts: list[Any] = [prompts] if single else list(prompts)
        reads = []
        for i, text in enumerate(texts):
            name = "prompt" if len(texts) == 1 else f"prompts[{i}]"
            if isinstance(text, Mapping):
                text = text.get("prompt_token_ids", text.get("prompt"))
            if isinstance(text, str):
                ids = self.frontend.tokenizer.encode(text)
            elif isinstance(text, list):
                check_token_ids(text, self.client.info.vocab_size, name)
                ids = text
            else:
                raise RequestError(f"{name} must be a text or token ids.", param=name)
            reads.append(_Read(fitting(self.frontend, ids, name, cutting)))
        return reads

    def _vectors(self, reads: list[_Read], params: PoolingParams, use_tqdm: bool) -> Vectors:
        facts = self.client.info.facts
        normalize = facts.normalize if params.use_activation is None else params.use_activation
        made = self._run(reads, facts.pooling, use_tqdm)
        made = unit(made) if normalize else made
        return shortened(made, params.dimensions, normalize=normalize)

    def _classes(self, reads: list[_Read], params: PoolingParams, use_tqdm: bool) -> Vectors:
        if params.dimensions is not None:
            raise RequestError("dimensions is of vectors, not of classes.", param="dimensions")
        made = self._run(reads, "classify", use_tqdm)
        return (
            made if params.use_activation is False else probabilities(made, self.client.info.facts.activation)
        )

    def _run(self, reads: list[_Read], pooling: Pooling, use_tqdm: bool) -> Vectors:
        """The engine's numbers for every text [N, ...]; Ctrl-C or an error aborts all."""
        waiting = deque(reads)

        def count() -> tuple[int, int]:
            done = [read for read in reads if read.delta is not None]
            return len(done), sum(len(read.ids) for read in done)

        with deferred_interrupt() as interrupted, progress(len(reads), use_tqdm) as tick:
            try:
                while waiting or self.open:
                    while waiting and self._submit(waiting[0], pooling):
                        waiting.popleft()
                    self.client.pump()
                    if interrupted():
                        raise KeyboardInterrupt
                    tick(count)
            finally:
                self.client.abort(list(self.open))
                self.open.clear()
        found = []
        for read in reads:
            if read.delta is None or read.delta.embedding is None:
                reason = read.delta.error if read.delta is not None else None
                raise OctavoError(f"A text could not be read: {reason or 'the engine gave no reason'}.")
            found.append(read.delta.embedding)
        return (
            np.frombuffer(b"".join(found), "<f4").reshape(len(reads), -1)
            if reads
            else np.zeros((0, 1), "<f4")
        )

    def _submit(self, read: _Read, pooling: Pooling) -> bool:
        """Hand a text over; False when the engine's queue is full."""
        read.id = next(self.numbers)
        request = GenerateRequest(
            id=read.id,
            prompt_token_ids=read.ids,
            sampling=msgspec.structs.replace(ONE_TOKEN),
            pooling=pooling,
            second_at=read.second_at,
        )
        try:
            self.client.submit(request, self._take)
        except QueueFullError:
            if not self.open:
                raise
            return False
        self.open[read.id] = read
        return True

    def _take(self, delta: TokenDelta) -> None:
        if delta.finish_reason is not None and (read := self.open.pop(delta.id, None)) is not None:
            read.delta = delta

    def _output(self, read: _Read, outputs: Out) -> PooledRequestOutput[Out]:
        cached = 0 if read.delta is None else read.delta.num_cached_tokens
        return PooledRequestOutput(self.name(), outputs, read.ids, cached)
