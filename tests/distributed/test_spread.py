"""One model over worker processes: the engine's answers, starts that must fail with a reason, ranks that die or hang."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest
from ranks import answers, options
from service import answer_all, descendants, lose_a_rank, wait_gone

from octavo import host
from octavo.engine.executor.multiproc import MultiprocExecutor
from octavo.errors import EngineDeadError, OctavoError, UnsupportedModelError, UsageError
from octavo.llm import LLM
from octavo.protocol.generate import SamplingParams

FAMILY = "qwen3"


def test_two_ranks_by_two_stages_answer_like_one_until_a_rank_is_killed(model: str) -> None:
    """Two steps under way in the stages, log probabilities from rank 0, and nobody left at the end."""
    asked = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    with LLM(options(model)) as llm:
        expected = answers(llm.client.core)
        one = llm.generate([[5, 6, 7, 8] * 9], asked, use_tqdm=False)[0]
    spread = options(model, tensor_parallel_size=2, pipeline_parallel_size=2, max_concurrent_batches=2)
    with LLM(spread) as llm:
        core = llm.client.core
        assert isinstance(core.executor, MultiprocExecutor)
        pids = core.executor.pids
        assert len(pids) == 4
        assert core.info.device.startswith("4 x ")
        assert {"joining", "weights", "cache"} <= set(core.info.timeline_s)
        assert answers(core) == expected
        two = llm.generate([[5, 6, 7, 8] * 9], asked, use_tqdm=False)[0]
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="Worker 1 has ended with status -9"):
            llm.generate([[5, 6, 7, 8] * 9], asked, use_tqdm=False)
        core.close()
    wait_gone(pids)
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
        ({"max_concurrent_batches": 2}, "must be from 1 to 1"),
        ({"execute_model_timeout_seconds": 1.0}, "must be at least 2, got 1"),
        (
            {"distributed_executor_backend": "ray", "nnodes": 2, "tensor_parallel_size": 2},
            "Ray|ray places ranks",
        ),
        ({"distributed_executor_backend": "external_launcher", "data_parallel_size": 2}, "does not go with"),
        ({"master_port": 0}, "--master-port must be from 1"),
        (
            {"tensor_parallel_size": 2, "distributed_executor_backend": "uni"},
            "uni has one process, but 2 ranks",
        ),
    ],
)
def test_flags_that_contradict_are_refused(flags: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        options("x", **flags)


def test_copies_of_a_model_answer_like_one_until_a_worker_hangs(model: str) -> None:
    """Each copy has a worker process; the one that is stopped ends its engine's requests, and with it the whole server."""
    prompts = [[3 + id] * (5 + 8 * id) for id in range(4)]
    asked = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    with LLM(options(model)) as llm:
        expected = [each.outputs[0].token_ids for each in llm.generate(prompts, asked, use_tqdm=False)]
    flags = {"distributed_executor_backend": "mp", "execute_model_timeout_seconds": 2.0}
    chosen = options(model, data_parallel_size=2, **flags)

    async def main() -> None:
        client = host.connect(chosen, host.open_files(chosen))
        assert await asyncio.wait_for(answer_all(client, prompts), 60) == expected
        await lose_a_rank(client, 0, signal.SIGSTOP, "Worker 0: no sign of life for 2 s")

    asyncio.run(main())
