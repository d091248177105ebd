"""Memory: what a start reckons and measures, and a step that finds none goes on in parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from octavo import host
from octavo.config import EngineOptions
from octavo.engine.core import EngineCore
from octavo.files.dummy import open_dummy
from octavo.protocol.generate import GenerateRequest, SamplingParams, TokenDelta
from octavo.runner.measure import graph_bytes, run_largest_step, shares
from octavo.runner.runner import TorchRunner

GIB = 1 << 30
CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}


def build(**changes: Any) -> EngineCore:
    options = EngineOptions.of(
        **{
            "model": "tiny",
            "load_format": "dummy",
            "device": "cpu",
            "cpu_backend": "torch",
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "num_gpu_blocks_override": 200,
            "enable_prefix_caching": False,
            **changes,
        }
    )
    return host.build_core(options, open_dummy(CONFIG))


def runner_of(core: EngineCore) -> TorchRunner:
    runner = core.executor.forward.__self__  # type: ignore[attr-defined]
    assert isinstance(runner, TorchRunner)
    return runner


def answers(core: EngineCore, requests: list[tuple[list[int], dict[str, Any]]]) -> list[list[TokenDelta]]:
    found: list[list[TokenDelta]] = [[] for _ in requests]
    for number, (prompt, sampling) in enumerate(requests):
        params = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True, **sampling}
        core.submit(GenerateRequest(id=number, prompt_token_ids=prompt, sampling=SamplingParams(**params)))
    while core.has_work:
        for delta in core.step():
            delta.times = None  # of the clock, not of the answer
            found[delta.id].append(delta)
    core.check()
    return found


def tokens(deltas: list[TokenDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.tokens]


REQUESTS: list[tuple[list[int], dict[str, Any]]] = [
    ([1, 2, 3], {}),
    (list(range(5, 45)), {"prompt_logprobs": 2}),
    ([7] * 12, {"temperature": 1.0, "seed": 3, "logprobs": 2}),
    ([9, 8], {"repetition_penalty": 1.3}),
    (list(range(100, 130)), {"logit_bias": {5: 2.0}}),
]


class Short:
    """Wraps a function of tensors: raises as torch does where the first argument has more than ``most`` rows."""

    def __init__(self, function: Callable[..., Any], rows: Callable[..., int], most: int) -> None:
        self.function, self.rows, self.most = function, rows, most
        self.raised = 0

    def __call__(self, *arguments: Any) -> Any:
        if self.rows(*arguments) > self.most:
            self.raised += 1
            raise torch.OutOfMemoryError("CUDA out of memory (made up).")
        return self.function(*arguments)


@pytest.mark.parametrize("most", [1000, 45, 41])
def test_a_forward_pass_without_memory_goes_on_in_parts(most: int) -> None:
    expected = answers(build(), REQUESTS)
    core = build()
    network = runner_of(core).network
    short = Short(network.forward, lambda batch: len(batch.token_ids), most)
    network.forward = short  # type: ignore[method-assign]
    assert answers(core, REQUESTS) == expected
    assert bool(short.raised) == (most < 1000)


def chances(deltas: list[TokenDelta]) -> list[float]:
    return [
        one.logprob
        for delta in deltas
        for candidates in [*(delta.prompt_logprobs or []), *(delta.logprobs or [])]
        for one in candidates
    ]


def test_a_draw_without_memory_goes_on_in_parts() -> None:
    expected = answers(build(), REQUESTS)
    core = build()
    network = runner_of(core).network
    short = Short(network.logits, lambda hidden: len(hidden), 2)
    network.logits = short  # type: ignore[method-assign]
    found = answers(core, REQUESTS)
    # Log probabilities of 39 prompt positions are made at once: that request fails alone, with its reason.
    assert found[1][-1].finish_reason == "error" and "memory" in (found[1][-1].error or "")
    for number in (0, 2, 3, 4):
        assert tokens(found[number]) == tokens(expected[number])
        # Products of fewer rows add up in another order.
        assert chances(found[number]) == pytest.approx(chances(expected[number]), abs=1e-5)
    assert short.raised


def test_a_row_that_does_not_fit_alone_fails_alone() -> None:
    expected = answers(build(), REQUESTS)
    core = build()
    network = runner_of(core).network
    short = Short(network.forward, lambda batch: len(batch.token_ids), 35)
    network.forward = short  # type: ignore[method-assign]
    found = answers(core, REQUESTS)
    assert [deltas[-1].finish_reason for deltas in found] == ["length", "error", "length", "length", "length"]
    assert [tokens(deltas) for deltas in found[2:]] == [tokens(deltas) for deltas in expected[2:]]
    assert tokens(answers(core, [REQUESTS[0]])[0]) == tokens(expected[0]), "the engine goes on"


def test_other_errors_are_not_hidden() -> None:
    core = build()

    def broken(batch: Any) -> torch.Tensor:
        raise RuntimeError("a bug")

    runner_of(core).network.forward = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="a bug"):
        answers(core, REQUESTS[:1])


def test_shares_fill_the_budget() -> None:
    assert shares(8192, 4, 131072) == [8189, 1, 1, 1]
    assert shares(100, 4, 40) == [40, 40, 19, 1]
    assert shares(1000, 3, 10) == [10, 10, 10]


def test_the_largest_step_asks_for_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    core = build()
    runner = runner_of(core)
    seen: list[tuple[int, int, int]] = []
    draw, rank = runner.sampler.draw, runner.sampler.rank

    def drawing(logits: torch.Tensor, step: Any, masks: Any) -> Any:
        seen.append((len(logits), len(masks), int(runner.slots.wants[step.slots_host].min())))
        return draw(logits, step, masks)

    ranked: list[int] = []

    def ranking(raw: torch.Tensor, *rest: Any) -> Any:
        ranked.append(len(raw))
        return rank(raw, *rest)

    monkeypatch.setattr(runner.sampler, "draw", drawing)
    monkeypatch.setattr(runner.sampler, "rank", ranking)
    run_largest_step(runner, 256)
    assert seen == [(8, 8, 1 | 2 | 4 | 8 | 16)]
    assert sum(ranked) == 8 + 64, "log probabilities of every row and of every prompt token"
    assert graph_bytes(runner, 256) == 0, "a device without graphs keeps nothing"
