"""Decode steps as recorded graphs: one replay instead of hundreds of launches.

A step in which every row computes one token that lies on the device has the same shape but for the number of
rows. It is padded to the next captured size; padding rows use the dummy slot, store nothing (-1) and are ignored.

    host: slots, starts ──one copy──> static buffer ──replay──> hidden states [size, E]
    inside the graph: token = last_token[slot], position = start, cache slot = page_table[slot, start / P] ...
    (one launch a cache group: ``ops.step.decode_inputs``)
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
from octavo.runner.mixed_graphs import MixedGraphs
from octavo.runner.record import Replays, record
from octavo.runner.sizes import recorded_sizes
from octavo.runner.slots import NEEDS_POSITIONS, Slots


class DecodeGraphs:
    """All captured sizes over one static input buffer and one shared memory pool."""

    def __init__(
        self, network: AnyNetwork, slots: Slots, builder: BatchBuilder, platform: Platform, max_model_len: int
    ) -> None:
        self.network = network
        self.slots = slots
        self.builder = builder
        self.platform = platform
        self.max_model_len = max_model_len
        self.static = torch.zeros((2, 1), dtype=torch.int32, device=platform.device)
        self.every = self.static[0]  # 0, 1, 2 ...: where rows of one token each begin
        # size -> slots and ends that a replay writes, [size] int64
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}
        self.replays: Replays = {}
        self.sizes: list[int] = []

    @torch.inference_mode()
    def capture(self, sizes: list[int], pool: object | None, done: Callable[[], None]) -> object | None:
        """Record every size in the given memory pool; calls ``done`` after each."""
        largest = max(sizes)
        self.static = torch.full(
            (2, largest), self.slots.dummy, dtype=torch.int32, device=self.platform.device
        )
        self.static[1].zero_()
        self.every = torch.arange(largest + 1, dtype=torch.int32, device=self.platform.device)
        self.replays, pool = record(self.network, self.platform, sizes, self._batch, pool, done)
        self.sizes = sorted(self.replays)
        return pool

    def run(self, plan: StepPlan) -> tuple[Prepared, Tensor] | None:
        """Replay the plan, or None where it is not a plain decode step of a captured size."""
        rows = plan.num_rows
        if not self.sizes or rows == 0 or rows > self.sizes[-1] or plan.num_tokens.count(1) != rows:
            return None
        slots = np.asarray(plan.slots, np.int64)
        starts = np.asarray(plan.starts, np.int64)
        if (starts < self.slots.num_known[slots]).any() or not all(plan.sample):
            return None
        if (self.slots.wants[slots] & NEEDS_POSITIONS).any() and (
            starts < self.slots.num_prompt[slots]
        ).any():
            return None
        size = next(captured for captured in self.sizes if captured >= rows)
        where, pages = self.slots.write_pages(plan.page_writes)
        padding = size - rows
        columns = [slots, np.full(padding, self.slots.dummy), starts, np.zeros(padding, np.int64)]
        extra = [np.asarray(where, np.int64), np.asarray(pages, np.int64)]
        up = self.builder.staging.upload([np.concatenate(columns), *extra])
        if where:
            self.slots.flat_tables[up[1]] = up[2]
        self.static[:, :size].copy_(up[0].view(2, size))
        replay, hidden = self.replays[size]
        replay()
        device_slots, ends = self.rows[size]
        step = Prepared(
            self._empty, rows, list(range(rows)), slots, starts + 1, device_slots[:rows], ends[:rows], []
        )
        return step, hidden[:rows]

    @property
    def _empty(self) -> Batch:
        nothing = self.static[0, :0]
        return Batch(nothing, nothing, nothing, nothing, [], nothing, 0, 0)

    def _batch(self, size: int) -> Batch:
        """The step's tensors from the static buffer; every operation here is recorded."""
        slots, starts = self.static[0, :size], self.static[1, :size]
        made = [
            self.builder.decode_inputs(slots, starts, self.slots.last_token, group.table, group.page_size)
            for group in self.slots.tables
        ]
        first = made[0]
        self.rows[size] = first.slots, first.ends
        return Batch(
            token_ids=first.token_ids,
            positions=first.positions,
            query_start=self.every[: size + 1],
            kv_lens=first.kv_lens,
            groups=[GroupTables(each.page_table, each.slot_mapping) for each in made],
            sample_at=slice(None),
            max_query=1,
            max_kv=self.max_model_len,
        )


class StepGraphs:
    """Decode graphs, then mixed ones, over one shared memory pool; None from ``run`` means: launch kernel by kernel."""

    def __init__(
        self, network: AnyNetwork, slots: Slots, builder: BatchBuilder, platform: Platform, max_model_len: int
    ) -> None:
        self.decode = DecodeGraphs(network, slots, builder, platform, max_model_len)
        self.mixed = MixedGraphs(network, slots, builder, platform, max_model_len)

    def capture(self, max_num_seqs: int, max_tokens: int, progress: Callable[[int, int], None]) -> None:
        """Record all sizes; reports (done, in all)."""
        mixed, decode = recorded_sizes(max_num_seqs, max_tokens)
        count = 0

        def done() -> None:
            nonlocal count
            count += 1
            progress(count, len(decode) + len(mixed))

        pool = self.mixed.capture(mixed, None, done)
        self.decode.capture(decode, pool, done)

    def run(self, plan: StepPlan) -> tuple[Prepared, Tensor] | None:
        """Replay the plan if it fits a graph."""
        return self.decode.run(plan) or self.mixed.run(plan)
