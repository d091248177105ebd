"""The recorded steps compute what the plain ones do: padded decode and mixed batches, checked on the CPU with a platform
whose "recording" simply runs the work again."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from octavo import host
from octavo.config import EngineOptions
from octavo.device.platform.cpu import CPUPlatform
from octavo.engine.core import EngineCore
from octavo.engine.executor.inline import InlineExecutor
from octavo.engine.settings import EngineSettings
from octavo.files.dummy import open_dummy
from octavo.model.batch import Batch
from octavo.protocol.generate import GenerateRequest, SamplingParams
from octavo.runner.graphs import StepGraphs
from octavo.runner.runner import TorchRunner

CONFIG: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


class ReplayPlatform(CPUPlatform):
    """Graphs by repetition; counts the replays."""

    replays = 0

    def capture(self, work: Callable[[], None], pool: object | None) -> tuple[Callable[[], None], object]:  # type: ignore[override]
        def replay() -> None:
            self.replays += 1
            work()

        work()
        return replay, object()


def build(graphs: bool) -> tuple[EngineCore, ReplayPlatform, TorchRunner]:
    options = EngineOptions.of(
        model="tiny",
        device="cpu",
        cpu_backend="torch",
        max_num_seqs=12,
        max_num_batched_tokens=96,
        block_size=4,
    )
    built = host.build_runner(options, open_dummy(CONFIG, "tiny"))
    runner = built.runner
    assert isinstance(runner, TorchRunner)
    platform = ReplayPlatform()
    if graphs:
        keep_outputs_in_place(runner)
        recorded = StepGraphs(
            runner.network, runner.slots, runner.builder, platform, built.resolved.max_model_len
        )
        recorded.capture(12, 96, lambda done, total: None)
        runner.graphs = recorded
    settings = EngineSettings.of(built.resolved, vocab_size=128)
    return EngineCore(InlineExecutor(runner), settings), platform, runner


def keep_outputs_in_place(runner: TorchRunner) -> None:
    """A real recording writes its output to the same memory each time; so must the repetition."""
    forward = runner.network.forward
    outputs: dict[tuple[int, int], torch.Tensor] = {}

    def in_place(batch: Batch) -> torch.Tensor:
        fresh = forward(batch)
        key = (batch.token_ids.shape[0], fresh.shape[0])
        outputs.setdefault(key, torch.empty_like(fresh)).copy_(fresh)
        return outputs[key]

    runner.network.forward = in_place  # type: ignore[method-assign]


def run(core: EngineCore, seed: int) -> dict[int, list[int]]:
    """Requests that arrive over time, some greedy, some not, some asking for prompt log probabilities."""
    rng = random.Random(seed)
    out: dict[int, list[int]] = {}
    logprobs: dict[int, int] = {}
    pending = [
        GenerateRequest(
            id=i,
            prompt_token_ids=[rng.randrange(128) for _ in range(rng.randint(1, 70))],
            sampling=SamplingParams(
                temperature=rng.choice([0.0, 0.8]),
                seed=i,
                max_tokens=rng.randint(1, 25),
                prompt_logprobs=rng.choice([None, None, None, 2]),
                presence_penalty=rng.choice([0.0, 0.5]),
            ),
        )
        for i in range(30)
    ]
    while pending or core.has_work:
        while pending and rng.random() < 0.5:
            core.submit(pending.pop())
        for delta in core.step():
            assert delta.finish_reason in (None, "length"), delta
            out.setdefault(delta.id, []).extend(delta.tokens)
            if delta.prompt_logprobs:
                logprobs[delta.id] = len(delta.prompt_logprobs)
        core.check()
    return {**out, -1: sorted(logprobs.values())}


@pytest.mark.parametrize("seed", [1, 2])
def test_recorded_steps_equal_plain_steps(seed: int) -> None:
    plain, _, _ = build(graphs=False)
    recorded, platform, runner = build(graphs=True)
    expected = run(plain, seed)
    assert run(recorded, seed) == expected
    assert runner.graphs is not None
    assert platform.replays > 20
    assert expected[-1]  # prompt log probabilities were among them, on the plain path


def test_sizes_cover_the_limits() -> None:
    recorded, _, runner = build(graphs=True)
    assert runner.graphs is not None
    assert runner.graphs.decode.sizes == [1, 2, 4, 8, 12]
    assert runner.graphs.mixed.sizes == [64]
    recorded.close()
