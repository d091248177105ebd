"""What ``LLM`` returns; names and fields are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar


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


@dataclass
class EmbeddingOutput:
    """A vector."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """How many numbers it has."""
        return len(self.embedding)


@dataclass
class ClassificationOutput:
    """How likely each label is, in the model's order."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return len(self.probs)


@dataclass
class ScoringOutput:
    """How well a pair fits."""

    score: float


@dataclass
class PoolingOutput:
    """What the task made of a text."""

    data: list[float]


Pooled = TypeVar("Pooled")


@dataclass
class PooledRequestOutput(Generic[Pooled]):
    """One text, or one pair, and what became of it."""

    request_id: str
    outputs: Pooled
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True


EmbeddingRequestOutput = PooledRequestOutput[EmbeddingOutput]
ClassificationRequestOutput = PooledRequestOutput[ClassificationOutput]
ScoringRequestOutput = PooledRequestOutput[ScoringOutput]
PoolingRequestOutput = PooledRequestOutput[PoolingOutput]
