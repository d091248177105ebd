"""The token budget follows a device whose steps take base + tokens / rate seconds."""

from __future__ import annotations

import random

import pytest

from octavo.engine.scheduler.pace import LEAST, Pace


def train(pace: Pace, base_s: float, per_token_s: float, steps: int = 400, seed: int = 0) -> list[int]:
    """Steps that use their budget half of the time; returns the budgets."""
    rng = random.Random(seed)
    budgets = []
    for _ in range(steps):
        budget = pace.budget()
        budgets.append(budget)
        tokens = budget if rng.random() < 0.5 else rng.randint(1, 32)
        pace.observe(tokens, (base_s + tokens * per_token_s) * rng.uniform(0.97, 1.03))
    return budgets


@pytest.mark.parametrize(("base_s", "per_token_s"), [(0.004, 2.1e-5), (0.001, 3e-6), (0.004, 6e-4)])
def test_steps_take_the_target(base_s: float, per_token_s: float) -> None:
    pace = Pace(0.05, 8192)
    assert pace.budget() == 8192
    train(pace, base_s, per_token_s)
    budget = pace.budget()
    seconds = base_s + budget * per_token_s
    if budget == 8192:
        assert seconds <= 0.055
    else:
        assert 0.04 <= seconds <= 0.06


def test_it_adapts_to_a_slower_device_at_once() -> None:
    pace = Pace(0.05, 8192)
    train(pace, 0.001, 1e-5)
    fast = pace.budget()
    pace.observe(fast, fast * 4e-5)
    assert pace.budget() < fast / 2


def test_bounds() -> None:
    assert Pace(0.0, 512).budget() == 512
    slow = Pace(0.01, 8192)
    slow.observe(8192, 100.0)
    assert slow.budget() == LEAST
    tiny = Pace(0.01, 16)
    tiny.observe(16, 100.0)
    assert tiny.budget() == 16
    unlimited = Pace(0.0, 512)
    unlimited.observe(512, 100.0)
    assert unlimited.budget() == 512
