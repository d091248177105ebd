"""One model over worker processes: the engine's answers, starts that must fail with a reason, deaths in service."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import answers, options, whole
from test_parity import oracle
from tokenizers import Tokenizer, models, pre_tokenizers

from octavo import host
from octavo.engine.client.socket import SocketClient
from octavo.engine.executor.multiproc import MultiprocExecutor
from octavo.errors import OctavoError, OutOfMemoryError, UnsupportedModelError, UsageError
from octavo.llm import LLM
from octavo.protocol.generate import GenerateRequest, SamplingParams, TokenDelta


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("qwen3")
    oracle("qwen3", folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(128)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    return str(folder)


def descendants(pid: int) -> list[int]:
    """Every process below one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
            if parent == pid:
                found += [int(entry.name), *descendants(int(entry.name))]
    return found


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def wait_gone(pids: list[int], limit_s: float = 10) -> None:
    end = time.monotonic() + limit_s
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < end, f"still there: {[pid for pid in pids if not gone(pid)]}"
        time.sleep(0.02)


def test_two_ranks_by_two_stages_answer_like_one(model: str) -> None:
    """Overlapped steps through the ring, log probabilities from rank 0, and nobody left at the end."""
    chosen = options(model, tensor_parallel_size=2, pipeline_parallel_size=2, overlap=True)
    core = host.build_core(chosen, host.open_files(chosen))
    executor = core.executor
    assert isinstance(executor, MultiprocExecutor)
    pids = executor.pids
    assert len(pids) == 4
    assert core.info.device.startswith("4 x ")
    assert {"joining", "weights", "cache"} <= set(core.info.timeline_s)
    assert answers(core) == whole(model)
    core.close()
    wait_gone(pids)


def test_llm_over_two_ranks(model: str) -> None:
    asked = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    found = []
    for extra in ({}, {"tensor_parallel_size": 2}):
        with LLM(options(model, **extra)) as llm:
            found.append(llm.generate([[5, 6, 7, 8] * 9], asked, use_tqdm=False)[0])
    one, two = found
    assert one.outputs[0].token_ids == two.outputs[0].token_ids
    for ours, theirs in (
        (one.outputs[0].logprobs, two.outputs[0].logprobs),
        (one.prompt_logprobs, two.prompt_logprobs),
    ):
        assert ours is not None and theirs is not None
        for mine, other in zip(ours, theirs, strict=True):
            if mine is not None and other is not None:
                assert {k: pytest.approx(v.logprob, abs=1e-4) for k, v in mine.items()} == {
                    k: v.logprob for k, v in other.items()
                }


@pytest.mark.parametrize(
    ("extra", "error", "told"),
    [
        ({"tensor_parallel_size": 3}, UnsupportedModelError, "4 attention heads with 2 key heads cannot be split over 3"),
        ({"pipeline_parallel_size": 4}, UnsupportedModelError, "3 layers cannot be split into 4 stages"),
        ({"tensor_parallel_size": 2, "enable_expert_parallel": True}, UsageError, "this model has none"),
        ({"tensor_parallel_size": 2, "kv_cache_memory_bytes": 64, "num_gpu_blocks_override": None,
          "max_model_len": "200"}, OutOfMemoryError, "needs .* GiB, but 0.00 GiB are left"),
        ({"data_parallel_size": 2}, UsageError, "--data-parallel-size needs a process for each copy"),
    ],
)  # fmt: skip
def test_starts_that_fail_say_why(
    model: str, extra: dict[str, Any], error: type[OctavoError], told: str
) -> None:
    before = set(descendants(os.getpid()))
    chosen = options(model, **extra)
    with pytest.raises(error, match=told):
        host.build_core(chosen, host.open_files(chosen))
    wait_gone(list(set(descendants(os.getpid())) - before))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size must be at least 1"),
        ({"tensor_parallel_size": 3, "nnodes": 2}, "cannot be shared by 2 machines"),
        ({"node_rank": 1}, "--node-rank must be from 0 to 0"),
        ({"data_parallel_size": 2, "nnodes": 2, "tensor_parallel_size": 2}, "does not go with --nnodes"),
        ({"distributed_timeout_seconds": 0.0}, "must be above 0"),
        ({"master_port": 0}, "--master-port must be from 1"),
    ],
)
def test_flags_that_contradict_are_refused(flags: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        options("x", **flags)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_every_request_and_the_engine(model: str, rank: int) -> None:
    """Within five seconds, although the other rank may be waiting for the dead one."""

    async def main() -> None:
        chosen = options(model, tensor_parallel_size=2)
        client = host.connect(chosen, host.open_files(chosen))
        assert isinstance(client, SocketClient)
        processes = [client.pid, *descendants(client.pid)]
        workers = [
            pid
            for pid in descendants(client.pid)
            if b"executor.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert len(workers) == 2
        last: dict[int, TokenDelta] = {}
        seen = asyncio.Event()

        def sink(delta: TokenDelta) -> None:
            last[delta.id] = delta
            seen.set()

        for id in range(4):
            sampling = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
            client.submit(GenerateRequest(id=id, prompt_token_ids=[5, 6, 7], sampling=sampling), sink)
        await asyncio.wait_for(seen.wait(), 20)
        began = time.monotonic()
        os.kill(sorted(workers)[rank], signal.SIGKILL)
        while client.alive or any(delta.finish_reason is None for delta in last.values()):
            assert time.monotonic() - began < 5, "requests are still open"
            await asyncio.sleep(0.01)
        assert len(last) == 4
        for delta in last.values():
            assert delta.finish_reason == "error"
            assert delta.error is not None and f"Worker {rank} has ended with status -9" in delta.error, (
                delta.error
            )
        wait_gone(processes, 8)
        assert client._channel.process.returncode == 1
        await client.close()

    asyncio.run(main())


def test_copies_of_a_model_answer_like_one(model: str) -> None:
    async def main() -> None:
        chosen = options(model, data_parallel_size=2)
        client = host.connect(chosen, host.open_files(chosen))
        found: dict[int, list[int]] = {}
        done: set[int] = set()

        def sink(delta: TokenDelta) -> None:
            found.setdefault(delta.id, []).extend(delta.tokens)
            if delta.finish_reason is not None:
                done.add(delta.id)

        prompts = [[3 + id] * (5 + 8 * id) for id in range(4)]
        for id, prompt in enumerate(prompts):
            sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
            client.submit(GenerateRequest(id=id, prompt_token_ids=prompt, sampling=sampling), sink)
        while len(done) < 4:
            await asyncio.sleep(0.01)
        await client.close()
        asked = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
        with LLM(options(model)) as llm:
            for id, output in enumerate(llm.generate(prompts, asked, use_tqdm=False)):
                assert found[id] == output.outputs[0].token_ids

    asyncio.run(asyncio.wait_for(main(), 60))
