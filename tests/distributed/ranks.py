"""Many small models through the same two ranks: ``python ranks.py FOLDER`` runs every job of FOLDER/jobs.json as the rank
that its environment names, by an engine of its own (``external_launcher``: all ranks schedule alike)."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import torch
from forked import Forked

from octavo import host
from octavo.config import EngineOptions
from octavo.engine.core import EngineCore
from octavo.engine.executor.crew import LOOPBACK, NO_MULTICAST
from octavo.engine.executor.inline import InlineExecutor
from octavo.engine.settings import EngineSettings
from octavo.errors import OctavoError
from octavo.model.read_arch import read_arch
from octavo.protocol.control import CheckPool
from octavo.protocol.generate import GenerateRequest, SamplingParams

NUM_TOKENS = 3


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
    """Run jobs (keyword arguments of ``options``) on ``size`` ranks; what every rank answered for every job."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {**NO_MULTICAST, **os.environ, **LOOPBACK, **shared}
    on_gpu = any(job.get("device") == "cuda" for job in jobs)
    processes: list[Any] = []
    for rank in range(size):
        mine = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, __file__, str(folder)]
        processes.append(
            subprocess.Popen(command, env=mine) if on_gpu else Forked(forked.rank, main, folder, mine)
        )
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


def free_port() -> int:
    """A port that is free, and so are the next two."""
    while True:
        with socket.socket() as one, socket.socket() as two, socket.socket() as three:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            try:
                two.bind(("127.0.0.1", port + 1))
                three.bind(("127.0.0.1", port + 2))
            except (OSError, OverflowError):
                continue
            return port


def main(folder: Path) -> None:
    """One rank; like a script that has joined its processes before it makes a model, it owns the process group."""
    import torch.distributed as dist

    jobs = json.loads((folder / "jobs.json").read_text())
    if jobs[0].get("device") == "cuda":
        results = main_on_gpu(jobs)
    else:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        results = [run_job({"distributed_executor_backend": "external_launcher", **job}) for job in jobs]
    (folder / f"answers{os.environ['RANK']}.json").write_text(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)


def run_job(job: dict[str, Any]) -> Any:
    """The answers, or what the start complained of."""
    chosen = options(**job)
    try:
        core = host.build_core(chosen, host.open_files(chosen))
    except OctavoError as error:
        return f"{type(error).__name__}: {error}"
    found = answers(core)
    core.close()
    return found


def main_on_gpu(jobs: list[dict[str, Any]]) -> list[Any]:
    """All jobs through one meeting (the sizes of the first hold for all): NCCL's groups are dear to make."""
    from octavo.device.distributed.cards import check_cards, cuda_card
    from octavo.device.distributed.world import Meeting, join
    from octavo.device.platform.select import open_platform
    from octavo.host import torch_engine
    from octavo.host.built import Timeline, quiet

    # Tiny models compile what they meet; the whole warm-up of each would take minutes for all of them.
    torch_engine.warm = lambda runner, max_model_len: 0
    torch.backends.cuda.matmul.allow_tf32 = False
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    tensor_size = options(**jobs[0]).parallel.tensor_parallel_size
    platform = open_platform("cuda", threads=1, index=rank)
    meeting = Meeting(rank, size, tensor_size, 60.0, address="127.0.0.1", port=int(os.environ["MASTER_PORT"]))
    world = join(meeting, platform.device)
    print(check_cards([cuda_card(rank, "here", platform.device, size)]), flush=True)
    results: list[Any] = []
    for job in jobs:
        chosen = options(**{"distributed_executor_backend": "external_launcher", **job})
        files = host.open_files(chosen)
        built = torch_engine.build(chosen, files, read_arch(files), Timeline.start(), quiet, platform, world)
        settings = EngineSettings.of(built.resolved, vocab_size=built.arch.vocab_size)
        core = EngineCore(InlineExecutor(built.runner), settings)
        results.append(answers(core))
        core.close()
    return results


if __name__ == "__main__":
    main(Path(sys.argv[1]))
