"""Datasets and arrival times of the load generator."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from octavo.bench.load import (
    TokenIds,
    arrival_times,
    as_text,
    custom_samples,
    prefix_repetition_samples,
    random_samples,
    sharegpt_samples,
)
from octavo.errors import UsageError


def test_random_prompts_are_distinct_in_their_first_page() -> None:
    ids = TokenIds(first=10, count=8)
    samples = random_samples(64, 16, 4, ids=ids)
    assert len({tuple(sample.prompt[:16]) for sample in samples}) == 64
    assert {len(sample.prompt) for sample in samples} == {16}
    assert all(10 <= token < 18 for sample in samples for token in sample.prompt)
    assert {sample.output_len for sample in samples} == {4}


def test_random_is_deterministic_in_the_seed() -> None:
    assert random_samples(5, 8, 8, seed=3) == random_samples(5, 8, 8, seed=3)
    assert random_samples(5, 8, 8, seed=3) != random_samples(5, 8, 8, seed=4)


def test_range_ratio_bounds_the_lengths() -> None:
    samples = random_samples(400, 100, 20, range_ratio=0.5)
    inputs = [sample.prompt_len for sample in samples]
    assert min(inputs) >= 50
    assert max(inputs) <= 150
    assert min(inputs) < 60
    assert max(inputs) > 140
    assert all(len(sample.prompt) == sample.prompt_len for sample in samples)
    assert all(10 <= sample.output_len <= 30 for sample in samples)
    with pytest.raises(UsageError, match="range-ratio"):
        random_samples(1, 8, 8, range_ratio=1.0)


def test_shared_prefix() -> None:
    samples = random_samples(10, 6, 2, prefix_len=32)
    assert len({tuple(sample.prompt[:32]) for sample in samples}) == 1
    assert len({tuple(sample.prompt[32:]) for sample in samples}) == 10
    assert samples[0].prompt_len == 38


def test_prefix_repetition_uses_each_prefix_equally() -> None:
    samples = prefix_repetition_samples(12, num_prefixes=3, prefix_len=20, suffix_len=5, output_len=7)
    counts: dict[tuple[int, ...], int] = {}
    for sample in samples:
        key = tuple(sample.prompt[:20])
        counts[key] = counts.get(key, 0) + 1
    assert sorted(counts.values()) == [4, 4, 4]
    assert len({tuple(sample.prompt) for sample in samples}) == 12
    with pytest.raises(UsageError, match="prefixes"):
        prefix_repetition_samples(2, num_prefixes=3, prefix_len=2, suffix_len=2, output_len=2)


def test_as_text_keeps_lengths_and_distinctness() -> None:
    texts = as_text(random_samples(20, 12, 3))
    assert len({sample.prompt for sample in texts}) == 20
    assert all(len(str(sample.prompt).split()) == 12 and sample.output_len == 3 for sample in texts)


def test_custom_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n\n{"prompt": "two", "output_tokens": 9}\n')
    samples = custom_samples(path, 3, 5)
    assert [(sample.prompt, sample.output_len) for sample in samples] == [("one", 5), ("two", 9), ("one", 5)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{broken", r":1 is not JSON"),
        ('{"text": "x"}', 'no text field "prompt"'),
        ('{"prompt": "x", "output_tokens": 0}', "output_tokens"),
        ("\n", "no usable prompt"),
    ],
)
def test_bad_custom_file_is_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        custom_samples(path, 1, 5)


def test_missing_file() -> None:
    with pytest.raises(UsageError, match="Cannot read the dataset"):
        custom_samples(Path("/nowhere/x.jsonl"), 1, 5)


def test_sharegpt(tmp_path: Path) -> None:
    path = tmp_path / "sharegpt.json"
    turns = [{"from": "human", "value": "question"}, {"from": "gpt", "value": "a" * 40}]
    path.write_text(json.dumps([{"conversations": turns}, {"conversations": turns[:1]}, {"x": 1}, 5]))
    (sample,) = sharegpt_samples(path, 1, None)
    assert (sample.prompt, sample.output_len) == ("question", 10)
    assert sharegpt_samples(path, 1, 33)[0].output_len == 33
    path.write_text("{}")
    with pytest.raises(UsageError, match="list of conversations"):
        sharegpt_samples(path, 1, None)


def test_arrival_times_offer_the_asked_rate() -> None:
    times = arrival_times(1000, 50.0, 1.0, seed=1)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(20.0)
    gaps = [b - a for a, b in pairwise(times)]
    spread = {b: _variation(arrival_times(4000, 50.0, b)) for b in (0.25, 1.0, 16.0)}
    assert min(gaps) >= 0
    # A gamma interval of shape b has a coefficient of variation of 1 / sqrt(b).
    assert spread[0.25] == pytest.approx(2.0, rel=0.15)
    assert spread[1.0] == pytest.approx(1.0, rel=0.1)
    assert spread[16.0] == pytest.approx(0.25, rel=0.1)
    assert arrival_times(3, float("inf"), 1.0) == [0.0, 0.0, 0.0]


def _variation(times: list[float]) -> float:
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    middle = sum(gaps) / len(gaps)
    return (sum((gap - middle) ** 2 for gap in gaps) / len(gaps)) ** 0.5 / middle


@pytest.mark.parametrize(("rate", "burstiness"), [(0.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0), (1.0, 0.0)])
def test_impossible_rates(rate: float, burstiness: float) -> None:
    with pytest.raises(UsageError):
        arrival_times(1, rate, burstiness)
