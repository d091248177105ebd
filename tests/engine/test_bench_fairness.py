"""The promise of the fair queue, on a deterministic clock: a flood of 200 requests is hardly felt by another tenant."""

from __future__ import annotations

import json

import pytest

from octavo.bench.fairness import Load, Machine, main, percentile, run

FLOOD = Load("flood", bursts=1, burst=200, every_ms=0.0, prompt=512, answer=512)


@pytest.mark.parametrize(
    "quiet",
    [
        Load("quiet", bursts=15, burst=1, every_ms=970.0, prompt=512, answer=32),
        Load("quiet", bursts=15, burst=8, every_ms=1000.0, prompt=512, answer=32),
        Load("quiet", bursts=15, burst=1, every_ms=1000.0, prompt=2048, answer=32),
    ],
    ids=["one prompt of one step", "bursts of 8", "long prompts"],
)
def test_p99_beside_a_flood_is_at_most_half_again_of_that_alone(quiet: Load) -> None:
    alone, fcfs, fair = run(quiet, FLOOD, Machine(), ("fcfs", "fair"))
    assert fair.p99_ratio <= 1.5, fair
    assert fcfs.p99_ratio > 50, fcfs
    assert alone.p99_ratio == 1.0
    # What the flood loses is what the other uses, not the machine.
    assert fcfs.flood_s < fair.flood_s < 1.05 * fcfs.flood_s


def test_equal_arguments_give_equal_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--flood", "20", "--bursts", "3", "--burst", "2", "--every-ms", "100", "--json"]
    texts = []
    for _ in range(2):
        assert main(arguments) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert [row["policy"] for row in json.loads(texts[0])] == ["alone", "fcfs", "priority", "fair"]
    assert main([*arguments[:-1]]) == 0
    assert "p99 / alone" in capsys.readouterr().out


def test_percentile_is_a_value_of_the_sample() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert percentile([1.0], 0.5) == 1.0
