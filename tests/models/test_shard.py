"""Tensor parallel ranks together are the whole model: their slices join, and their sums give its logits."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from harness import Driver
from test_parity import ROWS, close, expected, oracle, to_gguf
from torch import Tensor

from octavo.errors import UnsupportedModelError
from octavo.files.resolve import open_model
from octavo.model.describe import describe
from octavo.model.layers.build import Ranks
from octavo.model.read_arch import read_arch
from octavo.model.shard import shard


class Group:
    """Ranks as threads: every exchange waits for all of them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.given: list[Tensor | None] = [None] * size

    def exchange(self, rank: int, join: Callable[[list[Tensor]], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            self.given[rank] = x
            self.barrier.wait()
            out = join([part for part in self.given if part is not None])
            self.barrier.wait()  # nobody overwrites before all have read
            return out

        return run

    def ranks(self) -> list[Ranks]:
        return [
            Ranks(
                rank,
                self.size,
                self.exchange(rank, lambda parts: torch.stack(parts).sum(0)),
                self.exchange(rank, lambda parts: torch.cat(parts, -1)),
            )
            for rank in range(self.size)
        ]


def drivers(path: Path, size: int) -> list[Driver]:
    return [Driver(open_model(str(path)), ranks=ranks) for ranks in Group(size).ranks()]


def check(path: Path, size: int, wanted: Tensor, ids: list[int]) -> None:
    """Every rank computes the whole model's logits, over a prefill and decodes."""

    def run(driver: Driver) -> Tensor:
        row = driver.row()
        return torch.cat([driver.step([row], [part])[0] for part in (ids[:12], ids[12:13], ids[13:])])

    with ThreadPoolExecutor(size) as pool:
        for logits in pool.map(run, drivers(path, size)):
            close(logits, wanted)


def tokens(count: int) -> list[int]:
    rng = random.Random(8)
    return [rng.randrange(3, 128) for _ in range(count)]


@pytest.mark.parametrize("name", ROWS)
def test_two_ranks_give_the_whole_logits(name: str, tmp_path: Path) -> None:
    model, ids = oracle(name, tmp_path), tokens(20)
    check(tmp_path, 2, expected(model, ids), ids)


@pytest.mark.parametrize("gguf", [False, True], ids=["hf", "gguf"])
def test_four_ranks_share_two_key_heads(gguf: bool, tmp_path: Path) -> None:
    """Neighbouring ranks hold the same key head; GGUF's turned rows are cut at heads before they are turned back."""
    model, ids = oracle("llama-bias" if not gguf else "llama", tmp_path), tokens(20)
    path = tmp_path
    if gguf:
        path = tmp_path / "model.gguf"
        to_gguf(model, "llama", path)
    check(path, 4, expected(model, ids), ids)


def test_slices_join_to_the_whole(tmp_path: Path) -> None:
    oracle("qwen2", tmp_path)
    whole = {item.hf: item.target for item in Driver(open_model(str(tmp_path))).network.items()}
    ranks = [{item.hf: item for item in driver.network.items()} for driver in drivers(tmp_path, 2)]
    assert [list(items) for items in ranks] == [list(whole)] * 2
    cut = 0
    for name, target in whole.items():
        pieces = [items[name] for items in ranks]
        found = pieces[0].cut
        if found is None:
            assert all(torch.equal(piece.target, target) for piece in pieces)
        else:
            cut += 1
            assert torch.equal(torch.cat([piece.target for piece in pieces], found.dim), target)
    assert cut == 3 * (7 + 3) + 1  # three layers of seven matrices and q, k, v biases; the head


@pytest.mark.parametrize(("size", "named"), [(3, "4 attention heads"), (8, "4 attention heads")])
def test_what_does_not_divide_is_refused(size: int, named: str, tmp_path: Path) -> None:
    oracle("llama", tmp_path)
    spec = describe(read_arch(open_model(str(tmp_path))))
    with pytest.raises(UnsupportedModelError, match=named):
        shard(spec, size)
    assert shard(spec, 1) is spec
