"""Many small models through the same two ranks: ``python ranks.py RANK FOLDER`` joins once, then every job of
FOLDER/jobs.json is built as this rank's part and run by an engine of its own (all ranks schedule alike)."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from octavo import host
from octavo.config import EngineOptions
from octavo.engine.core import EngineCore
from octavo.engine.executor.inline import InlineExecutor
from octavo.engine.executor.multiproc import LOOPBACK, NO_MULTICAST
from octavo.engine.settings import EngineSettings
from octavo.host.built import Timeline, quiet
from octavo.model.read_arch import read_arch
from octavo.protocol.control import CheckPool
from octavo.protocol.generate import GenerateRequest, SamplingParams

NUM_TOKENS = 8


def options(model: str, **extra: Any) -> EngineOptions:
    """Small engines whose schedule depends on nothing but the requests."""
    return EngineOptions.of(
        **{
            "model": model,
            "device": "cpu",
            "cpu_backend": "torch",
            "dtype": "float32",
            "max_num_seqs": 8,
            "max_num_batched_tokens": 32,
            "block_size": 16 if extra.get("device") == "cuda" else 4,
            "num_gpu_blocks_override": 512,
            "max_step_ms": 0.0,
            "threads": 1,
            **extra,
        }
    )


def answers(core: EngineCore, num_tokens: int = NUM_TOKENS) -> list[list[int]]:
    """Greedy and sampled rows, chunked prompts and decodes mixed."""
    rng = random.Random(3)
    found: dict[int, list[int]] = {}
    for i, length in enumerate((41, 1, 17)):
        found[i] = []
        sampling = SamplingParams(
            temperature=0.7 if i == 1 else 0.0, seed=i, max_tokens=num_tokens, ignore_eos=True
        )
        prompt = [rng.randrange(3, 128) for _ in range(length)]
        core.submit(GenerateRequest(id=i, prompt_token_ids=prompt, sampling=sampling))
    while core.has_work:
        for delta in core.step():
            assert delta.finish_reason in (None, "length"), delta
            found[delta.id] += delta.tokens
    core.control(CheckPool())
    return [found[i] for i in sorted(found)]


def whole(model: str, **extra: Any) -> list[list[int]]:
    """The answers of one device, in this process."""
    chosen = options(model, **extra)
    core = host.build_core(chosen, host.open_files(chosen))
    try:
        return answers(core)
    finally:
        core.close()


def run_ranks(folder: Path, jobs: list[dict[str, Any]], size: int = 2, timeout_s: float = 240) -> list[Any]:
    """Run jobs (keyword arguments of ``options``; the sizes of the first hold for all) on ``size`` ranks; what every
    rank answered for every job."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, __file__]
    environment = {**NO_MULTICAST, **os.environ, **LOOPBACK}
    processes = [
        subprocess.Popen([*command, str(rank), str(size), str(folder)], env=environment)
        for rank in range(size)
    ]
    end = time.monotonic() + timeout_s
    try:
        while any(process.poll() is None for process in processes):
            assert time.monotonic() < end, "the ranks hang"
            assert not any(process.poll() for process in processes), "a rank failed; its messages say why"
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads((folder / f"answers{rank}.json").read_text()) for rank in range(size)]


def main(rank: int, size: int, folder: Path) -> None:
    """One rank."""
    from octavo.device.distributed.cards import check_cards, cuda_card
    from octavo.device.distributed.world import Meeting, join
    from octavo.device.platform.select import open_platform
    from octavo.host import torch_engine

    # Tiny models compile what they meet; the whole warm-up of each would take minutes for all of them.
    torch_engine.warm = lambda runner, max_model_len: 0
    torch.backends.cuda.matmul.allow_tf32 = False
    jobs = json.loads((folder / "jobs.json").read_text())
    first = options(**jobs[0])
    platform = open_platform(first.device.device, threads=1, index=rank)
    tensor_size = first.parallel.tensor_parallel_size
    world = join(Meeting(rank, size, tensor_size, 60.0, path=str(folder / "meeting")), platform.device)
    if platform.kind == "cuda":
        print(check_cards([cuda_card(rank, "here", platform.device, size)]), flush=True)
    results: list[Any] = []
    for job in jobs:
        chosen = options(**job)
        files = host.open_files(chosen)
        built = torch_engine.build(chosen, files, read_arch(files), Timeline.start(), quiet, platform, world)
        settings = EngineSettings.of(built.resolved, vocab_size=built.arch.vocab_size)
        core = EngineCore(InlineExecutor(built.runner), settings)
        results.append(answers(core))
        core.close()
    (folder / f"answers{rank}.json").write_text(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
