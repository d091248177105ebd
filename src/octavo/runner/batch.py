"""From a plan to the tensors of a step: one packed upload, everything else derived on the device.

Rows of a mixed step, with two prefill chunks (a, b) and two decodes (c, d):

    tokens       a0 a1 a2 a3 | b7 b8 b9 | c | d        c and d come from slots.last_token
    query_start  0           4          7   8   9
    positions    0  1  2  3    7  8  9    41  17
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.device.ops.bind import Binder
from octavo.device.ops.step import DECODE_INPUTS, DecodeInputs
from octavo.device.platform.base import Platform
from octavo.model.batch import Batch, GroupTables, Prompts
from octavo.protocol.plan import StepPlan
from octavo.runner.slots import POOL, PROMPT_LOGPROBS, Slots
from octavo.runner.staging import Ints, Staging


@dataclass(frozen=True)
class PooledRow:
    """A plan row of a pooling sequence: how many of its hidden states count, and whether its prompt ends here."""

    row: int
    count: int
    is_last: bool


@dataclass
class Prepared:
    """A step ready to run.

    ``rows`` (host) are the plan rows that sample, ``slots_host`` their slots; ``slots`` and ``positions`` [S] the
    same on the device (position of the token to draw). The first S entries of ``batch.sample_at`` belong to them;
    what follows are prompt positions whose log probabilities were asked: ``prompt_rows`` lists (plan row, first
    position, count) in order. Behind those come the positions of ``pooled_rows``.
    """

    batch: Batch
    num_rows: int
    rows: list[int]
    slots_host: Ints
    positions_host: Ints
    slots: Tensor
    positions: Tensor
    prompt_rows: list[tuple[int, int, int]]
    pooled_rows: list[PooledRow] = field(default_factory=list)


class BatchBuilder:
    """Turns plans into ``Prepared`` steps for one device."""

    def __init__(
        self, slots: Slots, platform: Platform, max_tokens: int, max_model_len: int, binder: Binder
    ) -> None:
        self.slots = slots
        self._decode_inputs = binder.bind(DECODE_INPUTS, platform.op_spec(torch.float32))
        self.platform = platform
        self.max_model_len = max_model_len
        self.staging = Staging(platform, 6 * max_tokens + 8 * slots.num_slots + 1024)

    def decode_inputs(
        self, slots: Tensor, starts: Tensor, last_token: Tensor, table: Tensor, page_size: int
    ) -> DecodeInputs:
        """See ``ops.step.decode_inputs``."""
        return DecodeInputs(*self._decode_inputs(slots, starts, last_token, table, page_size))

    def build(self, plan: StepPlan) -> Prepared:
        """All tensors of the step; uploads page table changes on the way."""
        slots = self.slots
        row_slots = np.asarray(plan.slots, np.int64)
        starts = np.asarray(plan.starts, np.int64)
        counts = np.asarray(plan.num_tokens, np.int64)
        query_start = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=query_start[1:])
        positions = np.arange(query_start[-1]) + np.repeat(starts - query_start[:-1], counts)
        token_slots = np.repeat(row_slots, counts)
        from_device = starts >= slots.num_known[row_slots]
        token_ids = self.known_tokens(row_slots, starts, counts, query_start, ~from_device)
        rows = np.flatnonzero(np.asarray(plan.sample, bool))
        sample_at, prompt_rows = self._sample_at(plan, rows, row_slots, starts, counts, query_start)
        sample_at, pooled_rows = self._pool_at(sample_at, row_slots, starts, counts, query_start)
        where, pages = slots.write_pages(plan.page_writes)
        ends = starts + counts
        singles, longer = np.flatnonzero(counts == 1), np.flatnonzero(counts > 1)
        columns = [
            row_slots,
            query_start,
            ends,
            sample_at,
            token_ids,
            positions,
            token_slots,
            query_start[:-1][from_device],
            row_slots[from_device],
            row_slots[rows],
            ends[rows],
            np.asarray(where, np.int64),
            np.asarray(pages, np.int64),
            singles,
            longer,
        ]
        up = self.staging.upload(columns)
        if where:
            slots.flat_tables[up[11]] = up[12]
        batch = Batch(
            token_ids=self._token_ids(up[4], up[7], up[8]),
            positions=up[5].long(),
            query_start=up[1],
            kv_lens=up[2],
            groups=group_tables(slots, up[0], up[6], up[5]),
            sample_at=up[3].long(),
            max_query=int(counts.max(initial=0)),
            max_kv=int(ends.max(initial=0)),
            prompts=prompts(counts[longer], ends[longer], *up[13:]) if len(longer) else None,
        )
        return Prepared(
            batch,
            len(counts),
            rows.tolist(),
            row_slots[rows],
            ends[rows],
            up[9].long(),
            up[10].long(),
            prompt_rows,
            pooled_rows,
        )

    def _token_ids(self, known: Tensor, where: Tensor, from_slots: Tensor) -> Tensor:
        """Ids [T]: those that the host knows, and last tokens of slots at the places it does not."""
        ids = known.long()
        if len(where):
            ids[where] = self.slots.last_token[from_slots]
        return ids

    def known_tokens(
        self, row_slots: Ints, starts: Ints, counts: Ints, query_start: Ints, rows: NDArray[np.bool_]
    ) -> Ints:
        """Token ids [T] of the rows that the host knows; zeros elsewhere."""
        token_ids = np.zeros(int(query_start[-1]), np.int64)
        for row in np.flatnonzero(rows):
            start, count, at = starts[row], counts[row], query_start[row]
            token_ids[at : at + count] = self.slots.known[row_slots[row]][start : start + count]
        return token_ids

    def _sample_at(
        self, plan: StepPlan, rows: Ints, row_slots: Ints, starts: Ints, counts: Ints, query_start: Ints
    ) -> tuple[Ints, list[tuple[int, int, int]]]:
        """Tokens whose hidden states are needed: the end of each sampling row, then wanted prompt positions."""
        sample_at = query_start[1:][rows] - 1
        prompt_rows: list[tuple[int, int, int]] = []
        wanting = np.flatnonzero(self.slots.wants[row_slots] & PROMPT_LOGPROBS)
        extra = []
        for row in wanting:
            # Position p predicts token p + 1, so the last prompt position belongs to the answer.
            last = min(int(starts[row] + counts[row]), int(self.slots.num_prompt[row_slots[row]]) - 1)
            count = last - int(starts[row])
            if count > 0:
                prompt_rows.append((int(row), int(starts[row]), count))
                extra.append(query_start[row] + np.arange(count))
        return (np.concatenate([sample_at, *extra]) if extra else sample_at), prompt_rows

    def _pool_at(
        self, before: Ints, row_slots: Ints, starts: Ints, counts: Ints, query_start: Ints
    ) -> tuple[Ints, list[PooledRow]]:
        """``before``, then the tokens of pooling sequences whose hidden states count: all, the first, or the last of the prompt."""
        found: list[PooledRow] = []
        places: list[Ints] = []
        for row in np.flatnonzero(self.slots.wants[row_slots] & POOL):
            slot, at, count = row_slots[row], query_start[row], int(counts[row])
            is_last = bool(starts[row] + count == self.slots.num_prompt[slot])
            kind = self.slots.pooling[slot]
            if kind == "mean":
                here = at + np.arange(count)
            elif kind == "cls":
                here = at + np.arange(1 if starts[row] == 0 else 0)
            else:
                here = at + count - 1 + np.arange(1 if is_last else 0)
            found.append(PooledRow(int(row), len(here), is_last))
            places.append(here)
        return np.concatenate([before, *places]), found


def prompts(counts: Ints, ends: Ints, singles: Tensor, longer: Tensor) -> Prompts:
    """The step's rows by kind; ``counts`` and ``ends`` are the longer rows' queries and keys."""
    pairs = (counts * ends - counts * (counts - 1) // 2).sum()
    return Prompts(singles.long(), longer.long(), int(counts.sum()), int(ends.sum()), int(pairs))


def group_tables(
    slots: Slots, row_slots: Tensor, token_slots: Tensor, positions: Tensor
) -> list[GroupTables]:
    """Each group's page table rows [R, width] and the cache slot of every token [T]."""
    tables = []
    for group in slots.tables:
        page = group.table[token_slots, positions // group.page_size].long()
        mapping = page * group.page_size + positions % group.page_size
        tables.append(GroupTables(group.table.index_select(0, row_slots), mapping))
    return tables
