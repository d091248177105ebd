"""Steps that mix prompt chunks and decodes, as recorded graphs: padded to a number of tokens instead of rows.

    static int32 buffer   slots [R] | query_start [R + 1] | kv_lens [R] | token ids [T] | positions [T] | token slots [T]
    padding rows          dummy slot, no queries          padding tokens   id 0, dummy slot, stored nowhere

A token id of -1 means "the slot's last token". Launching a step's kernels one by one costs the host milliseconds;
steps too large for the captured sizes keep the device busy longer than that and run without a graph.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from octavo.device.platform.base import Platform
from octavo.model.batch import Batch, GroupTables
from octavo.model.face import AnyNetwork
from octavo.protocol.plan import StepPlan
from octavo.runner.batch import BatchBuilder, Prepared
from octavo.runner.record import Replays, record
from octavo.runner.sizes import rows_of
from octavo.runner.slots import NEEDS_POSITIONS, Slots


class MixedGraphs:
    """Graphs by number of tokens; every graph has room for ``sizes.rows_of`` rows."""

    def __init__(
        self, network: AnyNetwork, slots: Slots, builder: BatchBuilder, platform: Platform, max_model_len: int
    ) -> None:
        self.network = network
        self.slots = slots
        self.builder = builder
        self.platform = platform
        self.max_model_len = max_model_len
        self.static = torch.zeros(0, dtype=torch.int32, device=platform.device)
        self.replays: Replays = {}
        self.sizes: list[int] = []

    def rows_of(self, tokens: int) -> int:
        """Rows that a graph of so many tokens has room for."""
        return rows_of(tokens, self.slots.num_slots)

    @torch.inference_mode()
    def capture(self, sizes: list[int], pool: object | None, done: Callable[[], None]) -> object | None:
        """Record every size in the given memory pool; calls ``done`` after each."""
        if not sizes:
            return pool
        largest = max(sizes)
        length = 3 * self.rows_of(largest) + 1 + 3 * largest
        self.static = torch.zeros(length, dtype=torch.int32, device=self.platform.device)
        # The layout of the static buffer follows the size: fill it with a valid step before each recording.
        for size in sorted(sizes, reverse=True):
            self.static.copy_(torch.from_numpy(self._padding(size, length)))
            found, pool = record(self.network, self.platform, [size], self._batch, pool, done)
            self.replays.update(found)
        self.sizes = sorted(self.replays)
        return pool

    def run(self, plan: StepPlan) -> tuple[Prepared, Tensor] | None:
        """Replay the plan, or None where no captured size fits it."""
        total = sum(plan.num_tokens)
        rows = plan.num_rows
        if not self.sizes or not total or total > self.sizes[-1]:
            return None
        size = next(captured for captured in self.sizes if captured >= total)
        room = self.rows_of(size)
        row_slots = np.asarray(plan.slots, np.int64)
        if rows > room or (self.slots.wants[row_slots] & NEEDS_POSITIONS).any():
            return None
        columns, ends = self._columns(plan, row_slots, size, room, total)
        sampling = np.flatnonzero(np.asarray(plan.sample, bool))
        where, pages = self.slots.write_pages(plan.page_writes)
        extra = [
            row_slots[sampling],
            ends[sampling],
            sampling,
            np.asarray(where, np.int64),
            np.asarray(pages, np.int64),
        ]
        up = self.builder.staging.upload([columns, *extra])
        if where:
            self.slots.flat_tables[up[4]] = up[5]
        self.static[: len(columns)].copy_(up[0])
        replay, hidden = self.replays[size]
        replay()
        nothing = self.static[:0]
        step = Prepared(
            Batch(nothing, nothing, nothing, nothing, [], nothing, 0, 0),
            rows,
            sampling.tolist(),
            row_slots[sampling],
            ends[sampling],
            up[1].long(),
            up[2].long(),
            [],
        )
        # Every row's last hidden state was computed; keep those that sample.
        return step, hidden[:rows] if len(sampling) == rows else hidden[up[3].long()]

    def _columns(
        self, plan: StepPlan, row_slots: np.ndarray, size: int, room: int, total: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The static buffer's content for a plan, and the rows' ends."""
        slots = self.slots
        starts = np.asarray(plan.starts, np.int64)
        counts = np.asarray(plan.num_tokens, np.int64)
        rows = len(counts)
        query_start = np.full(room + 1, total, np.int64)
        query_start[0] = 0
        np.cumsum(counts, out=query_start[1 : rows + 1])
        token_slots = np.full(size, slots.dummy, np.int64)
        token_slots[:total] = np.repeat(row_slots, counts)
        positions = np.zeros(size, np.int64)
        positions[:total] = np.arange(total) + np.repeat(starts - query_start[:rows], counts)
        known = starts < slots.num_known[row_slots]
        ids = np.zeros(size, np.int64)
        ids[:total] = np.where(
            np.repeat(known, counts),
            self.builder.known_tokens(row_slots, starts, counts, query_start[: rows + 1], known),
            -1,
        )
        padded_slots = np.full(room, slots.dummy, np.int64)
        padded_slots[:rows] = row_slots
        kv_lens = np.zeros(room, np.int64)
        kv_lens[:rows] = ends = starts + counts
        return np.concatenate([padded_slots, query_start, kv_lens, ids, positions, token_slots]), ends

    def _padding(self, size: int, length: int) -> np.ndarray:
        """A step of one dummy row that fills all tokens, so that recording runs every kernel over them."""
        room = self.rows_of(size)
        buffer = np.zeros(length, np.int32)
        buffer[:room] = self.slots.dummy
        buffer[room + 1 : 2 * room + 1] = size
        buffer[2 * room + 1] = size
        tokens = 3 * room + 1
        buffer[tokens + size : tokens + 2 * size] = np.arange(size) % self.max_model_len
        buffer[tokens + 2 * size : tokens + 3 * size] = self.slots.dummy
        return buffer

    def _batch(self, size: int) -> Batch:
        """The step's tensors from the static buffer; every operation here is recorded."""
        room = self.rows_of(size)
        parts = torch.split(self.static[: 3 * room + 1 + 3 * size], [room, room + 1, room, size, size, size])
        slots, query_start, kv_lens, ids, positions, token_slots = parts
        real = token_slots != self.slots.dummy
        groups = []
        for group in self.slots.tables:
            page = group.table[token_slots, positions // group.page_size].long()
            mapping = torch.where(real, page * group.page_size + positions % group.page_size, -1)
            groups.append(GroupTables(group.table.index_select(0, slots), mapping))
        return Batch(
            token_ids=torch.where(ids < 0, self.slots.last_token[token_slots], ids.long()),
            positions=positions.long(),
            query_start=query_start,
            kv_lens=kv_lens,
            groups=groups,
            sample_at=(query_start[1:] - 1).clamp(min=0).long(),
            max_query=size,
            max_kv=self.max_model_len,
        )
