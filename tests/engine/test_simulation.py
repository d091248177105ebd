"""The scheduler's first test: thousands of random lives against a sequential reference (see simulation.py)."""

from __future__ import annotations

import pytest
from simulation import Outcome, run

RUNS, BLOCKS = 2000, 20


@pytest.mark.parametrize("block", range(BLOCKS))
def test_every_answer_equals_the_sequential_one(block: int) -> None:
    size = RUNS // BLOCKS
    outcomes: list[Outcome] = [run(seed) for seed in range(block * size, (block + 1) * size)]
    # The scenarios must be hard, or equality proves nothing.
    assert sum(outcome.tokens for outcome in outcomes) > 10 * size
    assert sum(outcome.preemptions for outcome in outcomes) > size // 10
    assert sum(outcome.hits for outcome in outcomes) > 2 * size
    assert sum(outcome.accepted for outcome in outcomes) > size // 4
