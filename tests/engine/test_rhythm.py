"""Which step size a device and model get: a device made of a formula, in virtual time."""

from __future__ import annotations

from typing import Any

from octavo.engine.scheduler.pace import ALMOST_FREE, Pace
from octavo.host.rhythm import ANSWERS, SIZES, SMOOTH_S, almost_free, cheapest
from octavo.protocol.plan import StepPlan


class Device:
    """An executor: a step of answers alone is a graph; one with a prompt launches its kernels, then both wait for the
    weights or compute."""

    num_slots = 256

    def __init__(self, launches_s: float, reading_s: float, tokens_per_s: float) -> None:
        self.launches_s, self.reading_s, self.tokens_per_s = launches_s, reading_s, tokens_per_s
        self.now_s = 0.0
        self.steps: set[int] = set()

    def forward(self, plan: StepPlan) -> None:
        tokens = sum(plan.num_tokens)
        self.steps.add(tokens)
        self.now_s += self.launches_s if max(plan.num_tokens) > 1 else 0.0
        self.now_s += max(self.reading_s, tokens / self.tokens_per_s)

    def sample(self, masks: list[Any]) -> None:
        assert masks == []

    def collect(self) -> None:
        """Nothing to fetch."""

    def free(self, max_tokens: int = 8192, max_model_len: int = 8192) -> int:
        return almost_free(self, max_tokens, max_model_len, lambda: self.now_s)  # type: ignore[arg-type]


def test_a_large_model_takes_what_reading_weights_hides() -> None:
    """8B on an H100: 5.6 ms of reading, 47,000 tokens a second."""
    assert Device(0.0002, 0.0056, 47_000).free() == 256


def test_a_small_model_takes_as_much_as_stays_smooth() -> None:
    """0.6B: its launches take longer than its weights."""
    device = Device(0.0012, 0.0008, 250_000)
    free = device.free()
    assert free >= 1024 and device.launches_s + free / device.tokens_per_s <= SMOOTH_S
    assert device.steps == {ANSWERS, *SIZES}


def test_a_huge_model_keeps_the_default() -> None:
    assert Device(0.01, 0.05, 5_000).free() == ALMOST_FREE


def test_short_contexts_and_few_slots_measure_what_fits() -> None:
    device = Device(0.0012, 0.0008, 250_000)
    assert device.free(max_model_len=600) == 512 and max(device.steps) == 512
    assert Device(0.0012, 0.0008, 250_000).free(max_tokens=128) == ALMOST_FREE
    device.num_slots = 1
    assert device.free() == ALMOST_FREE


def test_cheapest_counts_each_token() -> None:
    assert cheapest(1e-3, {256: 2e-3, 512: 3e-3}, 32) == 512
    assert cheapest(1e-3, {256: 1.1e-3, 512: 3e-3}, 32) == 256
    assert cheapest(1e-3, {256: 2e-3, 512: 2 * SMOOTH_S}, 32) == 256


def test_pace_takes_the_measured_share() -> None:
    assert Pace(0.05, 8192, free=1024).prompts(64, 700) == 1024 - 64
    assert Pace(0.05, 8192).prompts(64, 700) == 256 - 64
