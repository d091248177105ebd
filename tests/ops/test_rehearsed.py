"""A start gone through without a card finds the kernels of the real one, and other processes compile them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from uninterpreted import environment

from octavo.config import EngineOptions, Hardware
from octavo.host.rehearsal import COMMAND, Play

pytest.importorskip("triton")

BASE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "dtype": "bfloat16",
    "rope_theta": 10000.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"num_hidden_layers": 2},
    "gemma3_text": {
        "num_hidden_layers": 6,
        "sliding_window": 32,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"],
        "query_pre_attn_scalar": 64,
        "rope_local_base_freq": 10000.0,
    },
    "qwen3_next": {
        "num_hidden_layers": 4,
        "layer_types": [*["linear_attention"] * 3, "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "partial_rotary_factor": 0.25,
    },
}


def model(folder: Path, kind: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**BASE, "model_type": kind, **MODELS[kind]}))
    return folder


def test_one_layer_of_each_kind_launches_what_the_whole_model_does(tmp_path: Path) -> None:
    folders = [str(model(tmp_path / kind, kind)) for kind in MODELS]
    script = Path(__file__).parent / "rehearsed.py"
    done = subprocess.run(
        [sys.executable, str(script), *folders],
        env=environment(tmp_path / "cache"),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["missed"] for each in found] == [[], [], []]
    assert min(each["kernels"] for each in found) > 20


def test_the_process_compiles_every_kernel_for_the_card(tmp_path: Path) -> None:
    options = EngineOptions()
    wanted = replace(
        options,
        model=replace(options.model, model=str(model(tmp_path / "m", "qwen3")), load_format="dummy"),
        scheduler=replace(options.scheduler, max_num_batched_tokens=256, max_num_seqs=4),
    )
    play = Play(wanted, Hardware("cuda", "a card", 80 << 30, 16, True), 90, 2)
    process = subprocess.Popen(
        COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(tmp_path / "cache")
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(msgspec.json.encode(play) + b"\n")
        process.stdin.flush()
        told = [json.loads(line) for line in process.stdout]
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stdin.close()
        process.stdout.close()
        process.wait()
    total = told[-1]["total"]
    assert total > 15
    assert [line["done"] for line in told if line["total"] == total][-1] == total
    machine_code = {path.stem for path in (tmp_path / "cache").rglob("*.cubin")}
    assert {"_rope_store_kernel", "_decode_kernel", "_varlen_kernel", "_argmax_merge_kernel"} <= machine_code
    assert len(list((tmp_path / "cache").rglob("*.cubin"))) == total


ENDS = """
import os
from octavo.device.kernels.compilers import Compilers, Kernel
for live in (lambda: os._exit(3), lambda: None):
    compilers = Compilers(90, 2, live)
    for number in range(300):  # more than wait in a socket
        compilers.compile(Kernel("octavo.device.kernels.triton.norm", "no_such_kernel", "x" * 2000))
    print(list(compilers.results()) == [False] * 300, flush=True)
    compilers.close()
"""


def test_processes_that_die_or_fail_end_the_wait(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDS],
        env=environment(tmp_path),
        stdin=subprocess.PIPE,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert done.stdout.split() == ["False", "True"]
