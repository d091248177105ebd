"""The figures of a load test against sequences whose statistics are known."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.bench import metrics
from octavo.bench.client import Answer
from octavo.errors import UsageError


def answer(start: float, ttft: float, itl: list[float], tokens: int, prompt: int = 5) -> Answer:
    return Answer(
        start=start,
        success=True,
        ttft=ttft,
        latency=ttft + sum(itl),
        itl=itl,
        output_tokens=tokens,
        prompt_tokens=prompt,
    )


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 100))
@settings(max_examples=200, deadline=None)
def test_percentile_is_numpys(values: list[float], percent: float) -> None:
    assert metrics.percentile(values, percent) == pytest.approx(np.percentile(values, percent), abs=1e-6)


def test_mean_and_deviation() -> None:
    values = [2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]
    assert metrics.mean(values) == 5.0
    assert metrics.deviation(values) == statistics.pstdev(values) == 2.0
    assert metrics.mean([]) == metrics.deviation([]) == metrics.percentile([], 99) == 0.0


def test_summary_of_a_known_load() -> None:
    answers = [
        answer(0.0, 0.1, [0.01, 0.03], 3),
        answer(0.0, 0.3, [0.02, 0.02, 0.02, 0.02], 5),
        answer(5.0, 0.2, [], 1, prompt=9),
        Answer(error="HTTP 500", prompt_tokens=100),
    ]
    result = metrics.summarize(
        answers, 2.0, metrics=("ttft", "tpot", "itl", "e2el"), percentiles=(50, 99.9), goodput={"ttft": 250}
    )
    assert (result["completed"], result["failed"]) == (3, 1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (19, 9)
    assert result["request_throughput"] == 1.5
    assert result["output_throughput"] == 4.5
    assert result["total_token_throughput"] == 14.0
    assert result["request_goodput"] == 1.0  # two answers within 250 ms in 2 s
    assert result["max_concurrent_requests"] == 2
    assert result["mean_ttft_ms"] == pytest.approx(200)
    assert result["median_ttft_ms"] == pytest.approx(200)
    assert result["std_ttft_ms"] == pytest.approx(statistics.pstdev([100, 200, 300]))
    # Per answer (latency - ttft) / (tokens - 1); an answer of one token has none.
    assert result["mean_tpot_ms"] == pytest.approx(20)
    assert result["p50_itl_ms"] == pytest.approx(20)
    assert result["p99.9_itl_ms"] == pytest.approx(np.percentile([10, 30, 20, 20, 20, 20], 99.9))
    assert result["mean_e2el_ms"] == pytest.approx((140 + 380 + 200) / 3)


def test_nothing_succeeded() -> None:
    result = metrics.summarize([Answer(error="x")], 1.0)
    assert (result["completed"], result["failed"], result["output_throughput"]) == (0, 1, 0.0)
    assert result["p99_itl_ms"] == 0.0


def test_table_has_every_figure() -> None:
    names, percentiles = ("ttft", "itl"), (50.0, 99.0)
    result = metrics.summarize([answer(0, 0.5, [0.25], 2)], 1.0, metrics=names, percentiles=percentiles)
    text = metrics.table(result, names, percentiles)
    for line in (
        "Successful requests:                     1",
        "Output token throughput (tok/s):         2.00",
        "P99 TTFT (ms):                           500.00",
        "Median ITL (ms):                         250.00",
    ):
        assert line in text
    assert "TPOT" not in text


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (metrics.parse_metrics, "ttft,ttlt"),
        (metrics.parse_percentiles, "a"),
        (metrics.parse_percentiles, "101"),
        (metrics.parse_goodput, ["ttft"]),
        (metrics.parse_goodput, ["itl:5"]),
    ],
)
def test_bad_flags(parse: object, text: object) -> None:
    with pytest.raises(UsageError):
        parse(text)  # type: ignore[operator]


def test_good_flags() -> None:
    assert metrics.parse_metrics("ttft, e2el") == ("ttft", "e2el")
    assert metrics.parse_percentiles("50,99.9") == (50.0, 99.9)
    assert metrics.parse_goodput(["ttft:500", "tpot:50"]) == {"ttft": 500.0, "tpot": 50.0}
