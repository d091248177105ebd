"""Two ranks answer like one device: tensor, expert and pipeline parallel, every family (gloo, float32)."""

from __future__ import annotations

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


def check(names: list[str], answers: list[Any], expected: dict[str, Any]) -> None:
    for name, *found in zip(names, *answers, strict=True):
        for rank, answer in enumerate(found):
            assert answer == expected[name], f"{name}, rank {rank}: {answer}"


def test_tensor_parallel(checkpoints: dict[str, str], expected: dict[str, Any], tmp_path: Path) -> None:
    """Every family in slices, then mixtures of experts with whole experts dealt out."""
    sparse = [
        name
        for name, path in checkpoints.items()
        if any(isinstance(layer.mlp, MoE) for layer in describe(read_arch(open_model(path))).layers)
    ]
    assert len(sparse) >= 6
    jobs: list[dict[str, Any]] = [{"model": path, "tensor_parallel_size": 2} for path in checkpoints.values()]
    jobs += [
        {"model": checkpoints[name], "tensor_parallel_size": 2, "enable_expert_parallel": True}
        for name in sparse
    ]
    check([*checkpoints, *sparse], run_ranks(tmp_path, jobs), expected)


def test_pipeline_parallel(checkpoints: dict[str, str], expected: dict[str, Any], tmp_path: Path) -> None:
    jobs = [{"model": path, "pipeline_parallel_size": 2} for path in checkpoints.values()]
    check(list(checkpoints), run_ranks(tmp_path, jobs), expected)
