"""What the CPU runner remembers of each sequence between steps: tokens, page tables, sampling parameters."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from octavo.engine.cache.layout import CacheLayout
from octavo.engine.cache.spec import ceil_div
from octavo.protocol.generate import SamplingParams
from octavo.protocol.plan import PageWrite, SlotInit

Ints = NDArray[np.int64]


class Slots:
    """Rows for ``num_slots`` sequences of at most ``max_model_len`` tokens.

    ``tokens`` [slots, max_model_len] int32 holds everything known: the prompt, then what was drawn. ``tables`` has one
    [slots, pages] int32 page table a group.
    """

    def __init__(self, num_slots: int, max_model_len: int, layout: CacheLayout) -> None:
        self.max_model_len = max_model_len
        self.tokens = np.zeros((num_slots, max_model_len + 1), np.int32)
        self.num_known = np.zeros(num_slots, np.int64)
        self.num_prompt = np.zeros(num_slots, np.int64)
        self.sampling: list[SamplingParams] = [SamplingParams()] * num_slots
        self.seeds = np.zeros(num_slots, np.int64)
        self.stop_token_ids: list[list[int]] = [[]] * num_slots
        self.page_sizes = [group.spec.page_size for group in layout.groups]
        self.tables = [
            np.zeros((num_slots, ceil_div(max_model_len, size) + 1), np.int32) for size in self.page_sizes
        ]

    def admit(self, admits: list[SlotInit]) -> None:
        """New sequences move in."""
        for admit in admits:
            slot, count = admit.slot, len(admit.token_ids)
            self.tokens[slot, :count] = admit.token_ids
            self.num_known[slot] = count
            self.num_prompt[slot] = admit.num_prompt
            self.sampling[slot] = admit.sampling
            self.seeds[slot] = admit.seed
            self.stop_token_ids[slot] = admit.stop_token_ids

    def write_pages(self, writes: list[PageWrite]) -> None:
        """Update page tables."""
        for write in writes:
            table = self.tables[write.group]
            table[write.slot, write.first : write.first + len(write.pages)] = write.pages

    def append(self, slot: int, position: int, token: int) -> None:
        """The token drawn for ``position``: the next decode row reads it. What the host knows already stays."""
        if self.num_known[slot] <= position < self.tokens.shape[1]:
            self.tokens[slot, position] = token
            self.num_known[slot] = position + 1
