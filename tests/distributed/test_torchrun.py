"""Processes that torchrun starts: ``octavo serve`` on every rank is one server. (``LLM`` there: see ranks.py.)"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from ranks import free_port, options
from service import add_tokenizer, descendants, wait_gone, workers_of
from test_parity import oracle

from octavo.config import EngineOptions
from octavo.errors import UsageError
from octavo.host.torchrun import as_machine, launched
from octavo.llm import LLM
from octavo.protocol.generate import SamplingParams

TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
SIGN = {"TORCHELASTIC_RUN_ID": "none"}


def rank_of(pid: int) -> str:
    """What torchrun has told a process."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(entry[5:].decode() for entry in entries if entry.startswith(b"RANK="))


def test_torchrun_serves_until_rank_0_is_asked_to_end(tmp_path: Path) -> None:
    """Two processes on the loopback answer like one; a SIGTERM to rank 0 ends all of them in order."""
    oracle("qwen3", tmp_path)
    add_tokenizer(tmp_path)
    prompt = [5, 6, 7, 8] * 5
    with LLM(options(str(tmp_path))) as llm:
        asked = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
        expected = llm.generate([prompt], asked, use_tqdm=False)[0].outputs[0].text
    flags = "--device cpu --cpu-backend torch --dtype float32 --num-gpu-blocks-override 512 --block-size 4 --threads 1"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-addr",
        "127.0.0.1",
    ]
    command += ["--master-port", str(free_port()), "-m", "octavo", "serve", str(tmp_path), "--port", "0"]
    command += ["--tensor-parallel-size", "2", *flags.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as torchrun:
        try:
            assert torchrun.stdout is not None
            line = next(line for line in torchrun.stdout if line.startswith("Serving "))
            processes = descendants(torchrun.pid)
            assert len(workers_of(torchrun.pid)) == 2
            body = {"prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
            reply = httpx.post(f"{line.split()[-1]}/completions", json=body, timeout=30)
            assert reply.json()["choices"][0]["text"] == expected, reply.text
            zero, one = sorted(
                (pid for pid in processes if b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes()),
                key=rank_of,
            )
            os.kill(one, signal.SIGTERM)  # as torchrun does to all; this one waits for rank 0
            os.kill(zero, signal.SIGTERM)
            assert torchrun.wait(30) == 0
            wait_gone(processes)
        finally:
            if torchrun.poll() is None:
                torchrun.terminate()


@pytest.mark.parametrize(
    ("environment", "flags", "told"),
    [
        (
            {},
            {"distributed_executor_backend": "external_launcher"},
            "the environment has no RANK, WORLD_SIZE",
        ),
        (SIGN, {}, "the environment has no RANK"),
        (TWO | SIGN, {"tensor_parallel_size": 4}, "2 processes were started, but --tensor-parallel-size 4 x"),
        (TWO | SIGN, {"tensor_parallel_size": 2, "nnodes": 2}, "The launcher says which rank"),
        (TWO | SIGN | {"RANK": "x"}, {}, "not of numbers"),
        (TWO | SIGN | {"RANK": "2"}, {"tensor_parallel_size": 2}, "contradicts itself: RANK 2, WORLD_SIZE 2"),
    ],
)
def test_what_a_launcher_says_must_fit(
    environment: dict[str, str], flags: dict[str, object], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        as_machine(EngineOptions.of(model="x", **flags), environment)


def test_a_rank_is_a_machine_of_one() -> None:
    alone = EngineOptions.of(model="x")
    assert as_machine(alone, TWO) is alone  # nobody asked for it: other programs set such names too
    made = as_machine(EngineOptions.of(model="x", tensor_parallel_size=2), TWO | SIGN).parallel
    assert (made.nnodes, made.node_rank, made.master_addr, made.master_port) == (2, 1, "10.0.0.1", 29501)
    assert made.uses_workers and not made.is_rank
    me = launched(TWO | {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert (me.local_rank, me.local_size, me.has_store) == (1, 2, True)
