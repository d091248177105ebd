"""Memory: what a start reckons and measures, and a step that finds none goes on in parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from octavo import host
from octavo.config import EngineOptions, Hardware
from octavo.device.platform.cpu import CPUPlatform
from octavo.engine.core import EngineCore
from octavo.errors import OutOfMemoryError
from octavo.files.dummy import LLAMA_3_1_8B, open_dummy
from octavo.host.fit import cheapest_cure, check_weights, weight_bytes
from octavo.host.torch_engine import Network
from octavo.model.describe import describe
from octavo.model.read_arch import read_arch
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
        assert found[number] == expected[number]
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


def test_weights_are_reckoned_as_they_are_allocated() -> None:
    core = build()
    network = runner_of(core).network
    spec = network.spec

    def make(device: torch.device, binder: Any) -> Network:
        return Network(
            spec,
            dtype=torch.float32,
            device=device,
            binder=binder,
            op_spec=CPUPlatform().op_spec(torch.float32),
            max_position=256,
        )

    real = sum(item.target.numel() * item.target.element_size() for item in network.items())
    assert weight_bytes(make) == real


class Card(CPUPlatform):
    """Facts of a GPU."""

    kind = "cuda"
    total, free = 80 * GIB, 79 * GIB

    def hardware(self) -> Hardware:
        return Hardware("cuda", "Test Card", self.total, 8, True)

    def free_bytes(self) -> int:
        return self.free


def test_a_start_refuses_weights_that_do_not_fit() -> None:
    card = Card()
    options = EngineOptions.of(model="m")
    check_weights(60 * GIB, options, card, torch.bfloat16)
    with pytest.raises(OutOfMemoryError) as error:
        check_weights(140 * GIB, options, card, torch.bfloat16)
    assert (
        "140.0 GiB" in error.value.cause
        and "Test Card" in error.value.cause
        and "80.0 GiB" in error.value.cause
    )
    assert error.value.cure is not None and "smaller" in error.value.cure
    card.free = 20 * GIB
    with pytest.raises(OutOfMemoryError) as error:
        check_weights(30 * GIB, options, card, torch.bfloat16)
    assert error.value.cure == "End the programs that hold 60.0 GiB of this card (nvidia-smi lists them)."


def test_the_cheapest_cure_comes_first() -> None:
    total = 80 * GIB
    assert "--gpu-memory-utilization 0.95" in cheapest_cure(75 * GIB, total, GIB, quantized=False)
    assert "nvidia-smi" in cheapest_cure(60 * GIB, total, 40 * GIB, quantized=False)
    assert "fp8" in cheapest_cure(120 * GIB, total, GIB, quantized=False)
    assert "fp8" not in cheapest_cure(120 * GIB, total, GIB, quantized=True)
    assert "4 such cards" in cheapest_cure(250 * GIB, total, GIB, quantized=False)


def test_eight_billion_parameters_are_fifteen_gibibytes() -> None:
    spec = describe(read_arch(open_dummy(LLAMA_3_1_8B)))

    def make(device: torch.device, binder: Any) -> Network:
        op_spec = CPUPlatform().op_spec(torch.bfloat16)
        return Network(
            spec, dtype=torch.bfloat16, device=device, binder=binder, op_spec=op_spec, max_position=64
        )

    assert weight_bytes(make) / GIB == pytest.approx(14.96, abs=0.01)
