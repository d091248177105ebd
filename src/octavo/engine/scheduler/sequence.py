"""A sequence: what the engine knows of one request. No phases, only counts.

    tokens          p p p p p p p g g            known to the host (prompt p, generated g)
    num_computed    c c c c c c c c              confirmed: a collected step has computed them
    num_queued      c c c c c c c c q q          optimistic: rows in flight compute q on top, drafts included

A row starts at ``num_queued``. While that is below ``len(tokens)`` the row is a chunk of known tokens; from there on
every row draws, so the token a decode row starts with is either known or about to be drawn by the row in flight. With
d drafts a row counts d + 1 tokens and the result corrects the counts; the runner knows the true positions.
"""

from __future__ import annotations

from typing import Protocol

from octavo.engine.cache.prefix import HashChain
from octavo.engine.cache.table import PageTable
from octavo.protocol.generate import GenerateRequest, Logprob, SamplingParams


class Constraint(Protocol):
    """A grammar over the generated tokens, with a memory that can go back (drafts are tried and taken back).

    ``mask`` may raise ``GrammarError``: the sequence then ends alone with that error.
    """

    @property
    def ended(self) -> bool:
        """Whether the answer is complete and no token can follow; it then stops without one."""

    def accept(self, token: int) -> bool:
        """Go on by one token; False (and no change) where the grammar forbids it."""

    def rewind(self, count: int) -> None:
        """Take the last ``count`` accepted tokens back."""

    def mask(self) -> bytes:
        """Bit mask of the tokens allowed next: ceil(vocabulary / 32) little-endian int32 words."""


class Sequence:
    """Mutable state of one request; ``slot`` is -1 while it waits."""

    __slots__ = (
        "admitted_s",
        "arrived_s",
        "cache_salt",
        "chain",
        "commit_at",
        "constraint",
        "drafts",
        "failed",
        "finished",
        "id",
        "is_simple",
        "key",
        "leader",
        "max_len",
        "min_len",
        "num_cached",
        "num_computed",
        "num_drafts",
        "num_in_line",
        "num_prompt",
        "num_queued",
        "pooling",
        "prompt_logprobs",
        "room",
        "sampling",
        "second_at",
        "seed",
        "slot",
        "stop_ids",
        "table",
        "tenant",
        "tokens",
        "weight",
    )

    def __init__(
        self,
        request: GenerateRequest,
        *,
        key: tuple[float, ...],
        max_model_len: int,
        seed: int,
        table: PageTable,
        constraint: Constraint | None = None,
        arrived_s: float = 0.0,
    ) -> None:
        """``key`` orders sequences (smaller runs first); ``seed`` is used where the request brings none."""
        sampling = request.sampling
        self.id = request.id
        self.key = key
        self.tokens = list(request.prompt_token_ids)
        self.num_prompt = len(self.tokens)
        self.sampling: SamplingParams = sampling
        self.seed = seed if sampling.seed is None else sampling.seed
        self.cache_salt = request.cache_salt
        self.constraint = constraint
        self.table = table
        self.tenant = request.terms.tenant
        self.weight = request.terms.weight
        self.leader = request.leader
        self.arrived_s = arrived_s
        self.admitted_s = -1.0  # never yet
        self.chain: HashChain | None = None
        # Lengths count prompt and answer; the last token is never computed, so rows end at max_len - 1.
        wanted = max_model_len if sampling.max_tokens is None else self.num_prompt + sampling.max_tokens
        self.max_len = min(wanted, max_model_len)
        self.pooling = request.pooling
        self.second_at = request.second_at
        if request.pooling is not None:  # every token is computed, none is drawn
            self.max_len = self.num_prompt + 1
        self.min_len = self.num_prompt + sampling.min_tokens
        eos = [] if sampling.ignore_eos else request.eos_token_ids
        # Nothing but stop tokens and lengths to look at when a token comes.
        self.is_simple = (
            constraint is None
            and sampling.prompt_logprobs is None
            and sampling.repetition_detection is None
            and request.pooling is None
        )
        self.stop_ids = frozenset([*eos, *sampling.stop_token_ids])
        self.slot = -1
        self.num_computed = 0
        self.num_queued = 0
        self.num_cached = -1  # not admitted yet
        self.num_drafts = 0  # drafts the runner has ready for the next row
        self.num_in_line = 0  # tokens that the waiting line counts for it
        self.drafts: list[int] = []  # the same as tokens, where a constraint must see them
        self.room = 0  # tokens that may be queued without asking any resource
        self.commit_at = 0  # confirmed count at which the pages must be looked at again
        self.finished = False
        self.failed = False
        self.prompt_logprobs: list[list[Logprob]] | None = None

    @property
    def needs_every_position(self) -> bool:
        """Whether each prompt token must be computed, also where its pages are cached."""
        return self.sampling.prompt_logprobs is not None or self.pooling in ("mean", "cls")
