"""From a plan to the tables of the tapes, in chunks of bounded size.

A plan of more tokens than the buffers hold is computed in several chunks; a row may end in the middle of one and go on in
the next, since everything it needs of itself is in its pages by then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from octavo.device.kernels.numba import shared
from octavo.engine.cache.layout import CacheLayout
from octavo.engine.cache.spec import WindowKV
from octavo.model.blocks import DecoderSpec, Rope
from octavo.protocol.plan import StepPlan
from octavo.runner.cpu.lower import EXTRA_PARTS, StepTables
from octavo.runner.cpu.program import attention_of
from octavo.runner.cpu.slots import Slots

Ints = NDArray[np.int64]
ITEM_TOKENS = 16  # queries of one attention item
KEPT_ANGLES = 16384  # positions whose rotations are kept once they were needed
ANGLES_STEP = 512


@dataclass(frozen=True)
class Chunk:
    """Part of a step: per piece of a row its plan row, slot, first position and count."""

    rows: Ints
    slots: Ints
    starts: Ints
    counts: Ints

    @property
    def firsts(self) -> Ints:
        """Where each piece begins among the chunk's tokens."""
        return np.cumsum(self.counts) - self.counts


def chunks(plan: StepPlan, limit: int) -> Iterator[Chunk]:
    """Cut a plan into chunks of at most ``limit`` tokens, in row order."""
    slots, starts = np.array(plan.slots, np.int64), np.array(plan.starts, np.int64)
    counts = np.array(plan.num_tokens, np.int64)
    if counts.sum() <= limit:
        if len(counts):
            yield Chunk(np.arange(len(counts)), slots, starts, counts)
        return
    pieces: list[tuple[int, int, int]] = []
    room = limit
    for row, total in enumerate(plan.num_tokens):
        done = 0
        while done < total:
            count = min(room, total - done)
            pieces.append((row, done, count))
            done += count
            room -= count
            if room == 0:
                yield _chunk(pieces, slots, starts)
                pieces, room = [], limit
    if pieces:
        yield _chunk(pieces, slots, starts)


def _chunk(pieces: list[tuple[int, int, int]], slots: Ints, starts: Ints) -> Chunk:
    rows, done, counts = (np.array(column, np.int64) for column in zip(*pieces))
    return Chunk(rows, slots[rows], starts[rows] + done, counts)


class StepWriter:
    """Fills ``StepTables`` for a chunk."""

    def __init__(
        self, spec: DecoderSpec, layout: CacheLayout, slots: Slots, tables: StepTables, threads: int
    ) -> None:
        self.slots = slots
        self.tables = tables
        self.threads = threads
        self.windows = [
            group.spec.window if isinstance(group.spec, WindowKV) else 0 for group in layout.groups
        ]
        self.kv_heads = max(attention_of(layer).num_kv_heads for layer in spec.layers)
        self.rotations = {rope: Rotations(rope, slots.max_model_len) for rope in tables.ropes}
        self.ramp = np.arange(len(tables.token_ids))

    def write(self, chunk: Chunk) -> None:
        """All tables but the head's."""
        tables, tokens = self.tables, int(chunk.counts.sum())
        if tokens == len(chunk.counts):  # every piece one token: most steps
            firsts, positions, token_slots = self.ramp[:tokens], chunk.starts, chunk.slots
        else:
            firsts = chunk.firsts
            positions = self.ramp[:tokens] + np.repeat(chunk.starts - firsts, chunk.counts)
            token_slots = np.repeat(chunk.slots, chunk.counts)
        tables.counts[0] = tokens
        tables.token_ids[:tokens] = self.slots.tokens[token_slots, positions]
        for group, (table, size) in enumerate(zip(self.slots.tables, self.slots.page_sizes)):
            pages, offsets = np.divmod(positions, size)
            tables.slots[group, :tokens] = table[token_slots, pages].astype(np.int64) * size + offsets
        for rope, rotations in self.rotations.items():
            rotations.write(positions, tables.ropes[rope])
        self._items(chunk, firsts, tokens)
        tables.counters[:] = 0
        tables.broken[:tokens] = 0

    def _items(self, chunk: Chunk, firsts: Ints, tokens: int) -> None:
        """Attention work: pieces of ITEM_TOKENS queries; few long decodes are split over their keys."""
        tables, groups = self.tables, len(self.slots.tables)
        if tokens == len(chunk.counts):
            slots, queries, position, token = chunk.slots, chunk.counts, chunk.starts, firsts
        else:
            numbers = -(-chunk.counts // ITEM_TOKENS)
            piece = np.repeat(np.arange(len(numbers)), numbers)
            offset = (np.arange(len(piece)) - np.repeat(np.cumsum(numbers) - numbers, numbers)) * ITEM_TOKENS
            slots, queries = chunk.slots[piece], np.minimum(chunk.counts[piece] - offset, ITEM_TOKENS)
            position, token = chunk.starts[piece] + offset, firsts[piece] + offset
        for group in range(groups):
            items = tables.items[group]
            count = len(queries)
            window = self.windows[group]
            columns = items[:count]
            columns[:, shared.TOKEN] = token
            columns[:, shared.QUERIES] = queries
            columns[:, shared.POSITION] = position
            columns[:, shared.FIRST_KEY] = np.maximum(0, position + 1 - window) if window else 0
            columns[:, shared.LAST_KEY] = position + queries
            table = self.slots.tables[group]
            columns[:, shared.TABLE] = table.ctypes.data + slots * table.strides[0]
            columns[:, shared.PART] = token
            tables.splits[group, :tokens] = 0
            if self._splits(chunk, group):
                count = self._split(group, count, tokens)
            tables.counts[2 + group] = count

    def _splits(self, chunk: Chunk, group: int) -> bool:
        """Whether to cut contexts at stretches: few sequences, many keys, and room for the parts."""
        works = len(chunk.counts) * self.kv_heads
        if self.threads == 1 or works >= 4 * self.threads or chunk.counts.max() > 1:
            return False
        longest = int(chunk.starts.max()) + 1
        if self.windows[group]:
            longest = min(longest, self.windows[group])
        stretches = longest // shared.STRETCH + 2
        return stretches > 2 and stretches * len(chunk.counts) <= EXTRA_PARTS

    def _split(self, group: int, count: int, tokens: int) -> int:
        """Cut every item's keys at multiples of STRETCH; all parts but the first get places behind the tokens'."""
        items = self.tables.items[group]
        whole = items[:count].copy()
        first, last = whole[:, shared.FIRST_KEY], whole[:, shared.LAST_KEY]
        numbers = (last - 1) // shared.STRETCH - first // shared.STRETCH + 1
        item = np.repeat(np.arange(count), numbers)
        begins = np.cumsum(numbers) - numbers
        part = np.arange(len(item)) - begins[item]
        edge = (first[item] // shared.STRETCH + part) * shared.STRETCH
        columns = whole[item]
        columns[:, shared.FIRST_KEY] = np.maximum(first[item], edge)
        columns[:, shared.LAST_KEY] = np.minimum(last[item], edge + shared.STRETCH)
        extra = tokens + begins - np.arange(count)  # part 0 stays in the token's own place
        columns[:, shared.PART] = np.where(part == 0, whole[item, shared.PART], extra[item] + part - 1)
        items[: len(item)] = columns
        self.tables.splits[group, :tokens, 0] = extra
        self.tables.splits[group, :tokens, 1] = numbers - 1
        return len(item)


class Rotations:
    """cos | sin of the angles of one rope by position; what was computed for the first positions is kept."""

    def __init__(self, rope: Rope, max_model_len: int) -> None:
        self.half = rope.dim // 2
        self.frequencies = np.array(rope.frequencies(max_model_len), np.float64)
        self.scale = np.float32(rope.scale)
        self.known = np.zeros((0, rope.dim), np.float32)

    def write(self, positions: Ints, out: NDArray[np.float32]) -> None:
        """Rows of ``out`` for some positions, in their order."""
        end = int(positions.max()) + 1
        if end > KEPT_ANGLES:
            out[: len(positions)] = self._compute(positions)
            return
        if end > len(self.known):
            more = np.arange(len(self.known), -(-end // ANGLES_STEP) * ANGLES_STEP)
            self.known = np.concatenate([self.known, self._compute(more)])
        np.take(self.known, positions, axis=0, out=out[: len(positions)], mode="clip")

    def _compute(self, positions: Ints) -> NDArray[np.float32]:
        angles = positions[:, None] * self.frequencies
        found = np.empty((len(positions), 2 * self.half), np.float32)
        found[:, : self.half] = np.cos(angles) * self.scale
        found[:, self.half :] = np.sin(angles) * self.scale
        return found
