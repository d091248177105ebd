"""From a plan to the tables of the tapes, in chunks of bounded size.

A plan of more tokens than the buffers hold is computed in several chunks; a row may end in the middle of one and go on in
the next, since everything it needs of itself is in its pages by then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from octavo.device.kernels.numba import attention as kernels
from octavo.engine.cache.layout import CacheLayout
from octavo.engine.cache.spec import WindowKV
from octavo.model.blocks import DecoderSpec
from octavo.protocol.plan import StepPlan
from octavo.runner.cpu.lower import EXTRA_PARTS, StepTables
from octavo.runner.cpu.program import attention_of
from octavo.runner.cpu.slots import Slots

Ints = NDArray[np.int64]
ITEM_TOKENS = 16  # queries of one attention item


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
        self.frequencies = {
            rope: (np.array(rope.frequencies(slots.max_model_len), np.float64), np.float32(rope.scale))
            for rope in tables.ropes
        }

    def write(self, chunk: Chunk) -> None:
        """All tables but the head's."""
        tables, firsts = self.tables, chunk.firsts
        tokens = int(chunk.counts.sum())
        positions = np.arange(tokens) + np.repeat(chunk.starts - firsts, chunk.counts)
        token_slots = np.repeat(chunk.slots, chunk.counts)
        tables.counts[0] = tokens
        tables.token_ids[:tokens] = self.slots.tokens[token_slots, positions]
        for group, (table, size) in enumerate(zip(self.slots.tables, self.slots.page_sizes)):
            pages = table[token_slots, positions // size].astype(np.int64)
            tables.slots[group, :tokens] = pages * size + positions % size
        for rope, (inv_freq, scale) in self.frequencies.items():
            angles = positions[:, None] * inv_freq
            tables.ropes[rope][:tokens, : rope.dim // 2] = np.cos(angles) * scale
            tables.ropes[rope][:tokens, rope.dim // 2 :] = np.sin(angles) * scale
        self._items(chunk, firsts, tokens)
        tables.counters[:] = 0
        tables.broken[:tokens] = 0

    def _items(self, chunk: Chunk, firsts: Ints, tokens: int) -> None:
        """Attention work: pieces of ITEM_TOKENS queries; few long decodes are split over their keys."""
        tables, groups = self.tables, len(self.slots.tables)
        numbers = -(-chunk.counts // ITEM_TOKENS)
        piece = np.repeat(np.arange(len(numbers)), numbers)
        offset = (np.arange(len(piece)) - np.repeat(np.cumsum(numbers) - numbers, numbers)) * ITEM_TOKENS
        queries = np.minimum(chunk.counts[piece] - offset, ITEM_TOKENS)
        position = chunk.starts[piece] + offset
        token = firsts[piece] + offset
        for group in range(groups):
            items = tables.items[group]
            count = len(piece)
            window = self.windows[group]
            columns = items[:count]
            columns[:, kernels.TOKEN] = token
            columns[:, kernels.QUERIES] = queries
            columns[:, kernels.POSITION] = position
            columns[:, kernels.FIRST_KEY] = np.maximum(0, position + 1 - window) if window else 0
            columns[:, kernels.LAST_KEY] = position + queries
            table = self.slots.tables[group]
            columns[:, kernels.TABLE] = table.ctypes.data + chunk.slots[piece] * table.strides[0]
            columns[:, kernels.PART] = token
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
        stretches = longest // kernels.STRETCH + 2
        return stretches > 2 and stretches * len(chunk.counts) <= EXTRA_PARTS

    def _split(self, group: int, count: int, tokens: int) -> int:
        """Cut every item's keys at multiples of STRETCH; all parts but the first get places behind the tokens'."""
        items = self.tables.items[group]
        whole = items[:count].copy()
        first, last = whole[:, kernels.FIRST_KEY], whole[:, kernels.LAST_KEY]
        numbers = (last - 1) // kernels.STRETCH - first // kernels.STRETCH + 1
        item = np.repeat(np.arange(count), numbers)
        begins = np.cumsum(numbers) - numbers
        part = np.arange(len(item)) - begins[item]
        edge = (first[item] // kernels.STRETCH + part) * kernels.STRETCH
        columns = whole[item]
        columns[:, kernels.FIRST_KEY] = np.maximum(first[item], edge)
        columns[:, kernels.LAST_KEY] = np.minimum(last[item], edge + kernels.STRETCH)
        extra = tokens + begins - np.arange(count)  # part 0 stays in the token's own place
        columns[:, kernels.PART] = np.where(part == 0, whole[item, kernels.PART], extra[item] + part - 1)
        items[: len(item)] = columns
        self.tables.splits[group, :tokens, 0] = extra
        self.tables.splits[group, :tokens, 1] = numbers - 1
        return len(item)
