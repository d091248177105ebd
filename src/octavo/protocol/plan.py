"""A step is a table: what the engine half tells a runner to compute, and what it hears back.

There are no phases. A row says: for ``slot``, compute ``num_tokens`` positions from ``start`` on.

    prefill chunk      start=0    num_tokens=512              (tokens known to the host)
    last chunk         start=512  num_tokens=40  sample=True  (... and draw the next one)
    decode             start=552  num_tokens=1   sample=True  (token read from the slot on the device)
    verify 3 drafts    start=553  num_tokens=4   num_drafts=3 sample=True

With overlap the host plans step N+1 before it knows the tokens of step N. Counts are then optimistic (every
draft accepted); the runner's slots hold the truth and ``StepResult.tokens`` corrects the host.
"""

from __future__ import annotations

import msgspec

from octavo.protocol.generate import Logprob, Pooling, SamplingParams


class SlotInit(msgspec.Struct, array_like=True):
    """A sequence moves into a slot: everything a runner must know of it until it leaves.

    ``token_ids`` are all tokens known now: the prompt, and after a preemption what was generated so far
    (from ``num_prompt`` on). ``stop_token_ids`` (eos included) are what ``min_tokens`` forbids. With ``pooling`` no row
    of the sequence samples; the one that ends its prompt brings a vector instead. ``second_at``: see ``GenerateRequest``.
    """

    slot: int
    token_ids: list[int]
    num_prompt: int
    sampling: SamplingParams
    seed: int
    stop_token_ids: list[int]
    pooling: Pooling | None = None
    second_at: int = 0


class PageWrite(msgspec.Struct, array_like=True, gc=False):
    """Page table update: logical pages ``first``.. of ``slot`` in ``group`` are now ``pages``."""

    group: int
    slot: int
    first: int
    pages: list[int]


class CopyPage(msgspec.Struct, array_like=True, tag="copy", gc=False):
    """Copy page ``source`` over page ``target`` before the step."""

    source: int
    target: int


class ZeroPage(msgspec.Struct, array_like=True, tag="zero", gc=False):
    """Clear a page before the step (recurrent state starts from zero)."""

    page: int


PageOp = CopyPage | ZeroPage


class StepPlan(msgspec.Struct, array_like=True):
    """One step: admissions, page table writes and page operations first, then the rows.

    Columns have one entry a row: ``slots``, ``starts`` (optimistic count of computed tokens), ``num_tokens``,
    ``num_drafts`` (how many of num_tokens are drafts), ``sample`` (draw tokens at the row's end).
    """

    step: int
    slots: list[int]
    starts: list[int]
    num_tokens: list[int]
    num_drafts: list[int]
    sample: list[bool]
    admits: list[SlotInit]
    page_writes: list[PageWrite]
    page_ops: list[PageOp]

    @property
    def num_rows(self) -> int:
        """How many rows the step has."""
        return len(self.slots)


class GrammarMask(msgspec.Struct, array_like=True):
    """Allowed tokens of one row: a bit mask of ceil(vocabulary / 32) little-endian int32 words per position.

    ``words`` holds (1 + num_drafts) masks one after the other: position i is valid if drafts 0..i-1 are accepted. It is
    empty where all tokens are allowed. ``penalties`` (empty: none) are taken from logits, token by token, likewise for
    each position.
    """

    row: int
    words: bytes
    penalties: list[dict[int, float]] = []


class StepResult(msgspec.Struct, array_like=True):
    """What a step drew: per plan row the accepted tokens (empty where ``sample`` is False).

    A row with d drafts returns between 1 and d + 1 tokens. ``num_drafts[i]`` is how many drafts the runner has
    ready for that slot's next step (empty list: none anywhere). ``logprobs`` and ``prompt_logprobs`` are None or
    per row None or one list a token (see ``TokenDelta``). ``errors`` maps a row to a message: that sequence failed
    alone (for example NaN logits) and must be ended. ``draft_tokens[i]`` are those drafts as tokens, needed only for
    rows whose sequence has a grammar (None: grammars then run without drafts). ``pooled`` maps rows that end the prompt
    of a pooling sequence to its vector (float32, little-endian).
    """

    step: int
    tokens: list[list[int]]
    num_drafts: list[int] = []
    logprobs: list[list[list[Logprob]] | None] | None = None
    prompt_logprobs: list[list[list[Logprob]] | None] | None = None
    errors: dict[int, str] | None = None
    draft_tokens: list[list[int]] | None = None
    pooled: dict[int, bytes] | None = None
