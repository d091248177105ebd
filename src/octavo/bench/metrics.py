"""From answers to the figures of a load test; keys are those of ``vllm bench serve``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from octavo.bench.client import Answer
from octavo.errors import UsageError

METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` of the sorted ``values`` lie, linear between neighbours; 0.0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; 0.0 of nothing."""
    return math.fsum(values) / len(values) if values else 0.0


def deviation(values: Sequence[float]) -> float:
    """Population standard deviation; 0.0 of nothing."""
    middle = mean(values)
    return math.sqrt(mean([(value - middle) ** 2 for value in values]))


@dataclass(frozen=True)
class Series:
    """Milliseconds of every answer that succeeded (``itl``: of every pair of chunks)."""

    ttft: list[float]
    tpot: list[float]
    itl: list[float]
    e2el: list[float]

    @classmethod
    def of(cls, answers: list[Answer]) -> Series:
        """Collect from answers; failed ones count nowhere."""
        good = [answer for answer in answers if answer.success]
        return cls(
            ttft=[1e3 * answer.ttft for answer in good],
            tpot=[1e3 * tpot(answer) for answer in good if answer.output_tokens > 1],
            itl=[1e3 * gap for answer in good for gap in answer.itl],
            e2el=[1e3 * answer.latency for answer in good],
        )


def tpot(answer: Answer) -> float:
    """Seconds a token after the first; 0.0 for answers of one token."""
    if answer.output_tokens < 2:
        return 0.0
    return (answer.latency - answer.ttft) / (answer.output_tokens - 1)


def summarize(
    answers: list[Answer],
    duration_s: float,
    *,
    metrics: Sequence[str] = ("ttft", "tpot", "itl"),
    percentiles: Sequence[float] = (99,),
    goodput: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Counts, throughputs and, for each of ``metrics``, mean, median, std and percentiles in milliseconds.

    ``goodput`` maps metric names to limits in ms: ``request_goodput`` counts only answers within all of them.
    """
    good = [answer for answer in answers if answer.success]
    seconds = max(duration_s, 1e-9)
    total_input = sum(answer.prompt_tokens for answer in good)
    total_output = sum(answer.output_tokens for answer in good)
    result: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "request_throughput": len(good) / seconds,
        "request_goodput": None,
        "output_throughput": total_output / seconds,
        "total_token_throughput": (total_input + total_output) / seconds,
        "max_concurrent_requests": peak_concurrency(good),
    }
    if goodput:
        result["request_goodput"] = sum(_within(answer, goodput) for answer in good) / seconds
    series = Series.of(answers)
    for name in metrics:
        values = getattr(series, name)
        result[f"mean_{name}_ms"] = mean(values)
        result[f"median_{name}_ms"] = percentile(values, 50)
        result[f"std_{name}_ms"] = deviation(values)
        for percent in percentiles:
            result[f"p{percent:g}_{name}_ms"] = percentile(values, percent)
    return result


def peak_concurrency(answers: list[Answer]) -> int:
    """How many of the answers were open at the same moment, at most."""
    edges = [(answer.start, 1) for answer in answers]
    edges += [(answer.start + answer.latency, -1) for answer in answers]
    peak = now = 0
    for _, step in sorted(edges):
        now += step
        peak = max(peak, now)
    return peak


def _within(answer: Answer, limits: dict[str, float]) -> bool:
    measured = {"ttft": answer.ttft, "tpot": tpot(answer), "e2el": answer.latency}
    return all(1e3 * measured[name] <= limit for name, limit in limits.items())


def parse_metrics(text: str) -> tuple[str, ...]:
    """``ttft,tpot`` to names; ``UsageError`` for an unknown one."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in METRICS:
            raise UsageError(f"--percentile-metrics knows {', '.join(METRICS)}; got {name!r}.")
    return names


def parse_percentiles(text: str) -> tuple[float, ...]:
    """``50,99`` to numbers from 0 to 100."""
    try:
        values = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UsageError(
            f"--metric-percentiles {text!r} is not a list of numbers.", "Write 50,90,99."
        ) from None
    if any(not 0 <= value <= 100 for value in values):
        raise UsageError(f"--metric-percentiles lie between 0 and 100, got {text}.")
    return values


def parse_goodput(items: Sequence[str]) -> dict[str, float]:
    """``ttft:500 tpot:50`` to limits in milliseconds."""
    limits = {}
    for item in items:
        name, _, value = item.partition(":")
        try:
            if name not in ("ttft", "tpot", "e2el"):
                raise ValueError
            limits[name] = float(value)
        except ValueError:
            raise UsageError(
                f"--goodput {item!r} is not a limit.", "Write ttft:500, tpot:50 or e2el:2000 (milliseconds)."
            ) from None
    return limits


def table(result: dict[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    """The result as the familiar two-column table."""

    def row(label: str, value: Any) -> str:
        text = f"{value:.2f}" if isinstance(value, float) else str(value)
        return f"{label + ':':<40} {text:<10}"

    lines = [
        f"{' Serving Benchmark Result ':=^51}",
        row("Successful requests", result["completed"]),
        row("Failed requests", result["failed"]),
        row("Benchmark duration (s)", result["duration"]),
        row("Total input tokens", result["total_input_tokens"]),
        row("Total generated tokens", result["total_output_tokens"]),
        row("Request throughput (req/s)", result["request_throughput"]),
        row("Output token throughput (tok/s)", result["output_throughput"]),
        row("Total token throughput (tok/s)", result["total_token_throughput"]),
        row("Peak concurrent requests", result["max_concurrent_requests"]),
    ]
    if result.get("request_goodput") is not None:
        lines.append(row("Request goodput (req/s)", result["request_goodput"]))
    for name in metrics:
        short = name.upper()
        lines.append(f"{METRICS[name]:-^51}")
        lines.append(row(f"Mean {short} (ms)", result[f"mean_{name}_ms"]))
        lines.append(row(f"Median {short} (ms)", result[f"median_{name}_ms"]))
        lines += [row(f"P{p:g} {short} (ms)", result[f"p{p:g}_{name}_ms"]) for p in percentiles]
    lines.append("=" * 51)
    return "\n".join(lines)
