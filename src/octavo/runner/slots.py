"""Persistent rows: what the device and the host remember of a sequence between steps.

A step sends only what changed: admissions and page table writes. In steady decode that is nothing but the row list.

    host                                   device, row = slot (the last row is a dummy for padding)
    known[slot]   prompt (+ resumed)       page_tables   all groups in one flat int32 tensor
    num_known, num_prompt                  last_token    drawn last, read by the next decode row
    sampling, wants (bit flags)            temperature, top_p, min_p, top_k, seed, penalties
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.device.platform.base import Platform
from octavo.engine.cache.layout import CacheLayout
from octavo.engine.cache.spec import ceil_div
from octavo.protocol.generate import Pooling, SamplingParams
from octavo.protocol.plan import PageWrite, SlotInit
from octavo.runner.staging import Staging

# What a slot asks of a step beyond drawing a token.
RANDOM, BIAS, PENALTY, LOGPROBS, PROMPT_LOGPROBS, MIN_TOKENS, POOL = 1, 2, 4, 8, 16, 32, 64
NEEDS_POSITIONS = PROMPT_LOGPROBS | POOL  # hidden states of the prompt: no captured graph gives those


@dataclass
class GroupTable:
    """One group's page table as a window of the flat tensor."""

    offset: int
    width: int
    page_size: int
    table: Tensor  # [num_slots + 1, width] int32, a view


class Slots:
    """Rows for ``num_slots`` sequences of at most ``max_model_len`` tokens."""

    def __init__(self, num_slots: int, max_model_len: int, layout: CacheLayout, platform: Platform) -> None:
        self.num_slots = num_slots
        self.dummy = num_slots
        self.device = device = platform.device
        self.staging = Staging(platform, 10 * min(64, num_slots))
        self.known: list[NDArray[np.int64]] = [np.zeros(0, np.int64)] * num_slots
        self.num_known = np.zeros(num_slots + 1, np.int64)
        self.num_prompt = np.zeros(num_slots + 1, np.int64)
        self.wants = np.zeros(num_slots + 1, np.int64)
        self.sampling: list[SamplingParams | None] = [None] * num_slots
        self.stop_token_ids: list[list[int]] = [[]] * num_slots
        self.pooling: list[Pooling | None] = [None] * num_slots
        rows = num_slots + 1
        widths = [ceil_div(max_model_len, group.spec.page_size) + 1 for group in layout.groups]
        self.flat_tables = torch.zeros(rows * sum(widths), dtype=torch.int32, device=device)
        self.tables: list[GroupTable] = []
        offset = 0
        for group, width in zip(layout.groups, widths):
            view = self.flat_tables[offset : offset + rows * width].view(rows, width)
            self.tables.append(GroupTable(offset, width, group.spec.page_size, view))
            offset += rows * width
        self.last_token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.floats = torch.zeros((rows, 6), dtype=torch.float32, device=device)
        self.ints = torch.zeros((rows, 2), dtype=torch.int64, device=device)

    def admit(self, admits: list[SlotInit]) -> None:
        """Fill slots with new sequences (one upload for all of them)."""
        if not admits:
            return
        floats = np.empty((len(admits), 6), np.float32)
        ints = np.empty((len(admits), 2), np.int64)
        for row, admit in enumerate(admits):
            sampling, slot = admit.sampling, admit.slot
            self.known[slot] = np.asarray(admit.token_ids, np.int64)
            self.num_known[slot] = len(admit.token_ids)
            self.num_prompt[slot] = admit.num_prompt
            self.sampling[slot] = sampling
            self.stop_token_ids[slot] = admit.stop_token_ids
            self.wants[slot] = wants_of(sampling) if admit.pooling is None else POOL
            self.pooling[slot] = admit.pooling
            floats[row] = (
                0.0 if sampling.greedy else sampling.temperature,
                sampling.top_p,
                sampling.min_p,
                sampling.presence_penalty,
                sampling.frequency_penalty,
                sampling.repetition_penalty,
            )
            ints[row] = (max(0, sampling.top_k), admit.seed)
        count = len(admits)
        # Seeds first: as 64-bit numbers they want an even place.
        seeds, values, slots, top_k = self.staging.upload(
            [
                ints[:, 1].copy().view(np.int32),
                floats.reshape(-1).view(np.int32),
                np.asarray([admit.slot for admit in admits], np.int64),
                ints[:, 0],
            ]
        )
        where = slots.long()
        self.floats[where] = values.view(torch.float32).view(count, 6)
        self.ints[where] = torch.stack((top_k.long(), seeds.view(torch.int64)), dim=1)

    def write_pages(self, writes: list[PageWrite]) -> tuple[list[int], list[int]]:
        """(flat index, page) of every page table entry that changes; the batch builder uploads them."""
        where: list[int] = []
        pages: list[int] = []
        for write in writes:
            table = self.tables[write.group]
            first = table.offset + write.slot * table.width + write.first
            where.extend(range(first, first + len(write.pages)))
            pages.extend(write.pages)
        return where, pages


def wants_of(sampling: SamplingParams) -> int:
    """The bit flags of a request's parameters."""
    wants = 0 if sampling.greedy else RANDOM
    if sampling.logit_bias:
        wants |= BIAS
    if sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0:
        wants |= PENALTY
    if sampling.logprobs is not None:
        wants |= LOGPROBS
    if sampling.prompt_logprobs is not None:
        wants |= PROMPT_LOGPROBS
    if sampling.min_tokens:
        wants |= MIN_TOKENS
    return wants
