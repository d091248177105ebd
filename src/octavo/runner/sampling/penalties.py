"""Token counts of the sequences that ask for penalties; nobody else pays for them.

A row of the table holds one int32 a vocabulary entry: bits 0-29 count how often the token was generated, bit 30
says that it occurs in the prompt. Rows are handed to slots on demand, so memory grows with the requests that
use penalties (4 bytes x vocabulary each), not with the number of slots.
"""

from __future__ import annotations

import numpy as np
import torch

from octavo.device.platform.base import Platform
from octavo.protocol.plan import SlotInit
from octavo.runner.slots import PENALTY, wants_of
from octavo.runner.staging import Staging

IN_PROMPT = 1 << 30
GROWTH = 8


class TokenCounts:
    """The table and which slot has which row (-1 = none)."""

    def __init__(self, num_slots: int, vocab_size: int, platform: Platform) -> None:
        self.device = device = platform.device
        self.staging = Staging(platform, 4096)
        self.vocab_size = vocab_size
        self.table = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self.row_of = np.full(num_slots + 1, -1, np.int64)
        self.free: list[int] = []

    def admit(self, admits: list[SlotInit]) -> None:
        """Give rows to the sequences that need one and take them from slots that no longer do."""
        wanting: list[tuple[int, SlotInit]] = []
        for admit in admits:
            wanted = wants_of(admit.sampling) & PENALTY
            row = int(self.row_of[admit.slot])
            if not wanted:
                if row >= 0:
                    self.free.append(row)
                    self.row_of[admit.slot] = -1
                continue
            if row < 0:
                row = self._take()
                self.row_of[admit.slot] = row
            wanting.append((row, admit))
        if wanting:
            self._fill(wanting)

    def _take(self) -> int:
        if not self.free:
            old = self.table.shape[0]
            more = torch.zeros((GROWTH, self.vocab_size), dtype=torch.int32, device=self.device)
            self.table = torch.cat((self.table, more))
            self.free = list(range(old, old + GROWTH))
        return self.free.pop()

    def _fill(self, wanting: list[tuple[int, SlotInit]]) -> None:
        """Count on the host, once for all: the device would have to be waited for to learn how many tokens differ."""
        places, numbers = [], []
        for row, admit in wanting:
            self.table[row].zero_()
            known = np.asarray(admit.token_ids, np.int64)
            prompt = np.unique(known[: admit.num_prompt])
            generated, times = np.unique(known[admit.num_prompt :], return_counts=True)
            places += [row * self.vocab_size + prompt, row * self.vocab_size + generated]
            numbers += [np.full(len(prompt), IN_PROMPT), times]
        where, values = self.staging.upload([np.concatenate(places), np.concatenate(numbers)])
        self.table.view(-1).index_add_(0, where, values)
