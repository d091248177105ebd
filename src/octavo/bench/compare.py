"""``octavo bench compare``: two servers under the same load, in turns, so that drift of the machine hits both.

Three rows: one user, eight users, and many at once ("peak"). A ratio is the first server over the second, of each
round; the table shows the median and the range over the rounds.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

from octavo.bench import metrics
from octavo.bench.load import Sample, TokenIds, random_samples
from octavo.bench.serve import Run, Target, Traffic, first_model, measure, run_loop
from octavo.errors import OctavoError, UsageError

Measure = Callable[[Target, list[Sample], Traffic, list[Sample]], Run]


@dataclass
class Round:
    """One server's figures of one round: output tokens a second and median latencies in milliseconds."""

    server: str
    concurrency: int
    number: int
    output_throughput: float
    median_ttft_ms: float
    median_itl_ms: float


@dataclass
class Row:
    """One level of load: medians of both servers and their ratio (median, lowest, highest of the rounds)."""

    name: str
    concurrency: int
    throughput: tuple[float, float]
    ttft_ms: tuple[float, float]
    ratio: float
    lowest: float
    highest: float


def load_levels(peak: int) -> list[tuple[str, int]]:
    """Name and number of clients of every row."""
    return [("1 user", 1), ("8 users", 8), (f"peak ({peak} users)", peak)]


def measured(target: Target, samples: list[Sample], traffic: Traffic, warmups: list[Sample]) -> Run:
    """One load on one server; any failed request is an ``OctavoError``: a ratio of failures means nothing."""
    run = run_loop(measure(target, samples, traffic, warmups))
    failed = [answer for answer in run.answers if not answer.success]
    if failed:
        raise OctavoError(f"{len(failed)} requests to {target.base_url} failed: {failed[0].error}.")
    return run


def compare(
    targets: list[Target], names: list[str], args: argparse.Namespace, once: Measure = measured
) -> list[Round]:
    """All rounds. In every round both servers get the same prompts; which one goes first alternates."""
    rounds = []
    ids = TokenIds(args.first_token_id, args.num_token_ids)
    seed = args.seed
    for _, concurrency in load_levels(args.peak_concurrency):
        for number in range(args.rounds):
            seed += 2  # fresh prompts a round: no prefix cache knows them
            count = concurrency * args.requests_per_client
            samples = random_samples(count, args.input_len, args.output_len, ids=ids, seed=seed)
            warmups = random_samples(concurrency, args.input_len, args.output_len, ids=ids, seed=seed + 1)
            order = (0, 1) if number % 2 == 0 else (1, 0)
            for which in order:
                traffic = Traffic(max_concurrency=concurrency)
                run = once(targets[which], samples, traffic, warmups if number == 0 else [])
                figures = metrics.summarize(run.answers, run.duration_s, metrics=("ttft", "itl"))
                rounds.append(
                    Round(
                        names[which],
                        concurrency,
                        number,
                        figures["output_throughput"],
                        figures["median_ttft_ms"],
                        figures["median_itl_ms"],
                    )
                )
    return rounds


def rows(rounds: list[Round], names: list[str], peak: int) -> list[Row]:
    """One row a level of load."""
    table = []
    for name, concurrency in load_levels(peak):
        mine: list[list[Round]] = [
            [r for r in rounds if r.concurrency == concurrency and r.server == server] for server in names
        ]
        for part in mine:
            part.sort(key=lambda r: r.number)
        ratios = [
            a.output_throughput / b.output_throughput if b.output_throughput else float("inf")
            for a, b in zip(*mine)
        ]
        table.append(
            Row(
                name,
                concurrency,
                _pair([[r.output_throughput for r in part] for part in mine]),
                _pair([[r.median_ttft_ms for r in part] for part in mine]),
                metrics.percentile(ratios, 50),
                min(ratios),
                max(ratios),
            )
        )
    return table


def render(table: list[Row], names: list[str]) -> str:
    """The rows as text."""
    first, second = (name[:16] for name in names)
    lines = [
        f"{'load':<18} {first + ' tok/s':>22} {second + ' tok/s':>22} {'ratio':>7}  {'range':<13} TTFT p50 ms",
    ]
    for row in table:
        lines.append(
            f"{row.name:<18} {row.throughput[0]:>22.1f} {row.throughput[1]:>22.1f} {row.ratio:>6.2f}x  "
            f"{f'{row.lowest:.2f}-{row.highest:.2f}':<13} {row.ttft_ms[0]:.0f} / {row.ttft_ms[1]:.0f}"
        )
    return "\n".join(lines)


def main(args: argparse.Namespace) -> int:
    """Run the comparison, print the table, write every round with ``--output-json``."""
    if args.rounds < 1 or args.requests_per_client < 1 or args.peak_concurrency < 1:
        raise UsageError("--rounds, --requests-per-client and --peak-concurrency must be at least 1.")
    if args.rival == "llama.cpp":
        if args.urls:
            raise UsageError(
                "llama.cpp is compared with a model in this process, not with a URL.", "Use --model."
            )
        result: int = import_module("octavo.bench.rival").main(args)
        return result
    if args.requantize or args.threads:
        raise UsageError("--requantize and --threads belong to --rival llama.cpp.")
    with ExitStack() as stack:
        if args.rival is not None:
            args.urls = [*args.urls, args.rival]
            if args.model and len(args.urls) == 1:
                args.urls = [stack.enter_context(served(args.model)), args.rival]
                args.names = args.names or [f"octavo {args.model}", args.rival]
        if len(args.urls) != 2:
            raise UsageError(
                f"Two sides are compared, but {len(args.urls)} were named.",
                "Give two URLs, one URL and --rival, or --model and --rival.",
            )
        return compare_servers(args)


@contextmanager
def served(model: str) -> Iterator[str]:
    """``octavo serve MODEL`` on a free port, ready; its URL. It ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "octavo", "serve", model, "--port", str(port)]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if child.poll() is not None:
                raise OctavoError(f"octavo serve {model} ended with status {child.returncode}.")
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        child.terminate()
        child.wait()


def compare_servers(args: argparse.Namespace) -> int:
    """Both servers on the same load."""
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    names = list(args.names or args.urls)
    if names[0] == names[1]:
        names = [f"{names[0]} (1)", f"{names[1]} (2)"]
    fields = {"temperature": 0.0, "ignore_eos": True}
    targets = []
    for index, url in enumerate(args.urls):
        model = args.models[index] if args.models else first_model(url, headers)
        targets.append(Target(url.rstrip("/"), model=model, headers=headers, fields=fields))
    rounds = compare(targets, names, args)
    table = rows(rounds, names, args.peak_concurrency)
    print(render(table, names))
    if args.output_json:
        content = {"rows": [asdict(row) for row in table], "rounds": [asdict(item) for item in rounds]}
        Path(args.output_json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def _pair(values: list[list[float]]) -> tuple[float, float]:
    return metrics.percentile(values[0], 50), metrics.percentile(values[1], 50)
