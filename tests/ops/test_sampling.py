"""The reference bodies of sampling: the distribution, the filters, and independence of the batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from octavo.device.ops import sampling as ops

DRAWS = 20_000
# 99.99 % point of chi-square for each number of degrees of freedom used below.
LIMIT = {1: 15.14, 3: 21.11, 7: 29.88}


def draw(logits: list[float], heat: float = 1.0, k: int = 0, p: float = 1.0, least: float = 0.0) -> Tensor:
    """How often each token comes in DRAWS draws that differ in seed and position only."""
    rows = torch.tensor(logits).expand(DRAWS, -1)
    tokens = ops.sample(
        rows,
        torch.full((DRAWS,), heat),
        torch.full((DRAWS,), k, dtype=torch.int32),
        torch.full((DRAWS,), p),
        torch.full((DRAWS,), least),
        torch.arange(DRAWS) // 100,
        torch.arange(DRAWS) % 100,
    )
    return torch.bincount(tokens, minlength=len(logits))


def chi_square(seen: Tensor, expected: Tensor) -> float:
    wanted = expected * DRAWS
    return float(((seen - wanted) ** 2 / wanted).sum())


LOGITS = [0.0, 1.0, 2.0, -1.0, 0.5, -2.0, 1.5, 0.2]


@pytest.mark.parametrize("heat", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(heat: float) -> None:
    seen = draw(LOGITS, heat)
    assert chi_square(seen, torch.softmax(torch.tensor(LOGITS) / heat, 0)) < LIMIT[7]


def test_noise_of_neighbours_is_independent() -> None:
    """Pairs of draws of one seed at consecutive positions: four cells, each a product of the margins."""
    tokens = ops.sample(
        torch.zeros(DRAWS + 1, 2),
        torch.ones(DRAWS + 1),
        torch.zeros(DRAWS + 1, dtype=torch.int32),
        torch.ones(DRAWS + 1),
        torch.zeros(DRAWS + 1),
        torch.full((DRAWS + 1,), 42),
        torch.arange(DRAWS + 1),
    )
    pairs = torch.bincount(tokens[:-1] * 2 + tokens[1:], minlength=4)
    assert chi_square(pairs, torch.full((4,), 0.25)) < LIMIT[3]


def test_filters_keep_what_they_say_and_renormalize() -> None:
    probabilities = [0.4, 0.3, 0.2, 0.1]
    logits = [math.log(x) for x in probabilities]
    two = torch.tensor([4 / 7, 3 / 7])
    for options in (
        {"k": 2},
        {"p": 0.65},
        {"least": 0.7},
        {"k": 3, "p": 0.7},
        {"k": 2, "p": 0.99, "least": 0.1},
    ):
        seen = draw(logits, **options)  # type: ignore[arg-type]
        assert seen[2:].sum() == 0, options
        assert chi_square(seen[:2], two) < LIMIT[1], options
    assert draw(logits, p=0.0)[0] == DRAWS
    assert draw(logits, k=1)[0] == DRAWS
    assert draw(logits, least=1.0)[0] == DRAWS


def test_equals_stay_together() -> None:
    seen = draw([1.0, 1.0, 1.0, 0.0], k=2)
    assert (seen[:3] > 0).all() and seen[3] == 0
    seen = draw([1.0, 1.0, 1.0, -9.0], p=0.5)
    assert (seen[:3] > 0).all() and seen[3] == 0


def test_a_row_draws_the_same_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 300, generator=generator)
    columns = (
        torch.linspace(0.0, 2.0, 9),
        torch.arange(-1, 8, dtype=torch.int32),
        torch.linspace(0.3, 1.0, 9),
        torch.linspace(0.0, 0.2, 9),
        torch.arange(9) - 4,
        torch.arange(9) * 2**33,
    )
    together = ops.sample(logits, *columns)
    order = torch.randperm(9, generator=generator)
    assert torch.equal(ops.sample(logits[order], *(column[order] for column in columns)), together[order])
    for i in range(9):
        assert ops.sample(logits[i : i + 1], *(column[i : i + 1] for column in columns))[0] == together[i]
    assert together[0] == logits[0].argmax()


def test_seed_and_position_matter_in_all_their_bits() -> None:
    seeds = torch.tensor([0, 1, 2**31, 2**32, 2**40, -1, 0, 0, 0])
    positions = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2**32, 2**40])
    noise = ops.gumbel(seeds, positions, 1000)
    assert noise.isfinite().all()
    for i in range(9):
        for j in range(i):
            assert (noise[i] != noise[j]).float().mean() > 0.99


def test_penalties_in_order() -> None:
    """Repetition for all that was seen, frequency and presence for what was generated."""
    logits = torch.tensor([[2.0, -2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    counts = torch.tensor([[0, 0, 0, 0], [ops.IN_PROMPT, ops.IN_PROMPT + 2, 3, 0]], dtype=torch.int32)
    rows = torch.tensor([1, -1], dtype=torch.int32)
    half, tenth, two = torch.full((2,), 0.5), torch.full((2,), 0.1), torch.full((2,), 2.0)
    ops.penalize(logits, counts, rows, half, tenth, two)
    expected = [1.0, -4.0 - 0.2 - 0.5, 1.0 - 0.3 - 0.5, 2.0]
    torch.testing.assert_close(logits, torch.tensor([expected, [1.0] * 4]))
    ops.count_tokens(counts, rows, torch.tensor([1, 2]))
    assert counts.tolist() == [[0] * 4, [ops.IN_PROMPT, ops.IN_PROMPT + 3, 3, 0]]


def test_logprobs_and_ranks() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0], [5.0, 5.0, 5.0]])
    values, ranks = ops.logprobs_of(logits, torch.tensor([1, 2]))
    torch.testing.assert_close(values, torch.log_softmax(logits, -1)[[0, 1], [1, 2]])
    assert ranks.tolist() == [2, 1]
