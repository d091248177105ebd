"""Two ranks answer like one device: tensor, expert and pipeline parallel, every family (gloo, float32)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks, whole
from test_parity import ROWS, oracle

from octavo.files.resolve import open_model
from octavo.model.blocks import MoE
from octavo.model.describe import describe
from octavo.model.read_arch import read_arch

# One row a family; its variants are cut alike.
FAMILIES = list({ROWS[name][0]: name for name in reversed(ROWS)}.values())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny random checkpoint of every family."""
    found = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        oracle(name, folder)
        found[name] = str(folder)
    return found


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, str]) -> dict[str, Any]:
    return {name: whole(path) for name, path in checkpoints.items()}


def test_two_ranks_answer_like_one_device(
    checkpoints: dict[str, str], expected: dict[str, Any], tmp_path: Path
) -> None:
    """Every family in slices and in stages, mixtures of experts also with whole experts dealt out, all through one pair of
    ranks; and a start that fails on both."""
    sparse = [
        name
        for name, path in checkpoints.items()
        if any(isinstance(layer.mlp, MoE) for layer in describe(read_arch(open_model(path))).layers)
    ]
    assert len(sparse) >= 6
    wanted: list[tuple[str, dict[str, Any]]] = [
        *[(name, {"tensor_parallel_size": 2}) for name in checkpoints],
        *[(name, {"tensor_parallel_size": 2, "enable_expert_parallel": True}) for name in sparse],
        *[(name, {"pipeline_parallel_size": 2, "max_concurrent_batches": 2}) for name in checkpoints],
    ]
    jobs = [{"model": checkpoints[name], **sizes} for name, sizes in wanted]
    tight = {"kv_cache_memory_bytes": 64, "num_gpu_blocks_override": None, "max_model_len": "200"}
    jobs.append({"model": checkpoints["llama"], "tensor_parallel_size": 2, **tight})
    for rank, found in enumerate(run_ranks(tmp_path, jobs)):
        for (name, sizes), answer in zip(wanted, found):
            assert answer == expected[name], f"{name}, {sizes}, rank {rank}: {answer}"
        assert re.match(r"OutOfMemoryError: .* needs .* GiB, but 0.00 GiB are left", found[-1]), found[-1]
