"""One model over worker processes: the engine's answers, starts that must fail with a reason, deaths in service."""

from __future__ import annotations

import os
from typing import Any

import pytest
from ranks import answers, options, whole
from service import add_tokenizer, descendants, kill_a_rank, serve_prompts, wait_gone
from test_parity import oracle

from octavo import host
from octavo.engine.executor.multiproc import MultiprocExecutor
from octavo.errors import OctavoError, OutOfMemoryError, UnsupportedModelError, UsageError
from octavo.llm import LLM
from octavo.protocol.generate import SamplingParams


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("qwen3")
    oracle("qwen3", folder)
    add_tokenizer(folder)
    return str(folder)


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
    for extra in ({"distributed_executor_backend": "mp"}, {"tensor_parallel_size": 2}):
        with LLM(options(model, **extra)) as llm:
            assert isinstance(llm.client.core.executor, MultiprocExecutor)
            assert len(llm.client.core.executor.pids) == options(model, **extra).parallel.ranks
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
        (
            {"tensor_parallel_size": 2, "distributed_executor_backend": "uni"},
            "uni has one process, but 2 ranks",
        ),
    ],
)
def test_flags_that_contradict_are_refused(flags: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        options("x", **flags)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_every_request_and_the_engine(model: str, rank: int) -> None:
    kill_a_rank(options(model, tensor_parallel_size=2), rank)


def test_copies_of_a_model_answer_like_one(model: str) -> None:
    prompts = [[3 + id] * (5 + 8 * id) for id in range(4)]
    found = serve_prompts(options(model, data_parallel_size=2), prompts)
    asked = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    with LLM(options(model)) as llm:
        assert found == [each.outputs[0].token_ids for each in llm.generate(prompts, asked, use_tqdm=False)]
