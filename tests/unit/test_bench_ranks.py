"""Ranks of a measurement: all are started, meet in one folder, and end together."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from octavo import host
from octavo.bench import collectives, gpu
from octavo.bench.ranks import run_ranks
from octavo.config import EngineOptions
from octavo.errors import UsageError
from octavo.files.dummy import open_dummy


@pytest.fixture(autouse=True)
def helpers_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)


def test_all_ranks_run_and_meet(tmp_path: Path) -> None:
    assert run_ranks("bench_rank", ["run", str(tmp_path)], 3) == 0
    meetings = {(tmp_path / f"rank{rank}").read_text() for rank in range(3)}
    assert len(meetings) == 1
    assert not Path(meetings.pop()).exists()


def test_one_that_fails_ends_the_others(tmp_path: Path) -> None:
    began = time.monotonic()
    assert run_ranks("bench_rank", ["fail", str(tmp_path)], 2) == 3
    assert time.monotonic() - began < 20


def test_the_flags_reach_every_rank() -> None:
    args = gpu.parse(
        ["-tp", "2", "--hf-overrides", '{"num_hidden_layers": 20}', "--meeting", "/x", "--rank", "1"]
    )
    assert (args.tensor_parallel_size, args.rank, args.meeting) == (2, 1, "/x")
    assert collectives.parse(["-tp", "4"]).tensor_parallel_size == 4
    assert collectives.SIZES[0] == 8 << 10 and collectives.SIZES[-1] == 8 << 20


def test_the_70b_shape() -> None:
    config = open_dummy("llama-3.1-70b").config
    assert (config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]) == (
        80,
        8192,
        28672,
    )
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (64, 8)


def test_overrides_replace_values_of_the_configuration() -> None:
    shape = {"model": "llama-3.1-70b", "load_format": "dummy"}
    options = EngineOptions.of(**shape, hf_overrides='{"num_hidden_layers": 20}')
    config = host.open_files(options).config
    assert (config["num_hidden_layers"], config["hidden_size"]) == (20, 8192)
    assert host.open_files(EngineOptions.of(**shape)).config["num_hidden_layers"] == 80
    with pytest.raises(UsageError, match="--hf-overrides is not a JSON object"):
        host.open_files(EngineOptions.of(**shape, hf_overrides="[1]"))
