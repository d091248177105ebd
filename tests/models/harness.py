"""Drives a ``Network`` by hand: page tables over shuffled page ids, any mix of rows, no engine."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from octavo.device.ops.bind import Binder, OpSpec
from octavo.engine.cache.layout import CacheLayout, plan_layout
from octavo.engine.cache.spec import ceil_div
from octavo.files.base import ModelFiles
from octavo.model.batch import Batch, GroupTables
from octavo.model.describe import cache_specs, describe
from octavo.model.layers.build import ALONE, CacheType, Ranks
from octavo.model.layers.cache_scales import calibrated
from octavo.model.load import renaming
from octavo.model.network import Network
from octavo.model.quantization.choose import choose_format
from octavo.model.read_arch import read_arch
from octavo.model.shard import shard
from octavo.runner.batch import prompts
from octavo.runner.pages import PageMemory

PAGE, NUM_PAGES, WIDTH = 4, 512, 64


@dataclass
class Row:
    """One sequence: how much is computed, and its pages by group (-1 = never had one)."""

    computed: int = 0
    pages: list[list[int]] = field(default_factory=list)


class Driver:
    """A loaded network with its own page memory; ``op_spec`` says which kernels compute it."""

    device = torch.device("cpu")

    def __init__(
        self,
        files: ModelFiles,
        seed: int = 0,
        ranks: Ranks = ALONE,
        dtype: torch.dtype = torch.float32,
        quantization: str | None = None,
        cache_dtype: torch.dtype | None = None,
        op_spec: OpSpec | None = None,
        page: int = PAGE,
        device: str = "cpu",
        binder: Binder | None = None,
    ) -> None:
        spec = shard(describe(read_arch(files)), ranks.size)
        op_spec = op_spec or OpSpec("cpu", str(dtype).removeprefix("torch."))
        self.op_spec, self.binder = op_spec, binder or Binder()
        self.device = torch.device(device)
        self.network = Network(
            spec,
            dtype=dtype,
            device=self.device,
            binder=self.binder,
            op_spec=op_spec,
            max_position=512,
            ranks=ranks,
            weight_format=choose_format(quantization, spec, op_spec, files, renaming(files, spec)),
            cache_type=CacheType(cache_dtype, calibrated(files.tensors)),
        )
        self.network.load(files)
        self.layout: CacheLayout = plan_layout(
            cache_specs(spec, page, dtype.itemsize, (cache_dtype or dtype).itemsize)
        )
        memory = PageMemory(self.layout, NUM_PAGES, self.device)
        self.network.bind_cache(memory.places)
        self.memory = memory
        self.free = list(range(1, NUM_PAGES))
        random.Random(seed).shuffle(self.free)

    def row(self) -> Row:
        return Row(0, [[] for _ in self.layout.groups])

    def step(self, rows: list[Row], tokens: list[list[int]]) -> list[Tensor]:
        """Append each row's tokens in one batch; logits [n, V] of every new token, by row."""
        counts = [len(ids) for ids in tokens]
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
        positions = torch.cat([torch.arange(r.computed, r.computed + n) for r, n in zip(rows, counts)])
        groups = []
        for index, group in enumerate(self.layout.groups):
            size = group.spec.page_size
            table = torch.zeros((len(rows), WIDTH), dtype=torch.int32)
            slots = []
            for i, (row, count) in enumerate(zip(rows, counts)):
                held = row.pages[index]
                # Pages behind the window are given away: their entries go stale and others overwrite them.
                for number in range(min(len(held), group.spec.live(row.computed).start)):
                    if held[number] >= 0:
                        self.free.insert(0, held[number])
                        self.memory.tensors[0][held[number]].fill_(0x7F)
                        held[number] = -1
                while len(held) < ceil_div(row.computed + count, size):
                    held.append(self.free.pop())
                table[i, : len(held)] = torch.tensor([max(page, 0) for page in held])
                where = range(row.computed, row.computed + count)
                slots += [held[p // size] * size + p % size for p in where]
            groups.append(GroupTables(table.to(self.device), torch.tensor(slots, device=self.device)))
        for row, count in zip(rows, counts):
            row.computed += count
        ends = np.array([row.computed for row in rows])
        given = np.array(counts)
        longer = given > 1
        batch = Batch(
            token_ids=torch.tensor([token for ids in tokens for token in ids], device=self.device),
            positions=positions.to(self.device),
            query_start=starts.to(self.device),
            kv_lens=torch.tensor([row.computed for row in rows], dtype=torch.int32, device=self.device),
            groups=groups,
            sample_at=torch.arange(sum(counts), device=self.device),
            max_query=max(counts),
            max_kv=max(row.computed for row in rows),
            prompts=prompts(
                given[longer],
                ends[longer],
                torch.from_numpy(np.flatnonzero(given == 1)).to(self.device),
                torch.from_numpy(np.flatnonzero(longer)).to(self.device),
            )
            if longer.any()
            else None,
        )
        with torch.inference_mode():
            logits = self.network.logits(self.network.forward(batch))
        return list(torch.split(logits, counts))
