"""The online rows of ``octavo bench table``: starts ``octavo serve``, loads it over HTTP, stops it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.bench import metrics
from octavo.bench.load import Sample, TokenIds, prefix_repetition_samples, random_samples
from octavo.bench.serve import Target, Traffic, first_model, measure, run_loop
from octavo.bench.table_rows import Row, Stage
from octavo.errors import OctavoError

STOP_S = 20.0
LAST_LINES = 8  # of a server's log that go into the error


@dataclass
class Server:
    """A running ``octavo serve``; ``start_s`` from the start of its process until it answered."""

    url: str
    start_s: float
    process: subprocess.Popen[str]
    log: Path


def serve_command(stage: Stage) -> list[str]:
    """The command line of a stage's server."""
    command = [sys.executable, "-m", "octavo", "serve", stage.model, "--load-format", "dummy", "--port", "0"]
    command += ["--disable-uvicorn-access-log"]
    if stage.quantization:
        command += ["--quantization", stage.quantization]
    for name, value in stage.flags.items():
        command += [f"--{name}", value]
    return command


@contextmanager
def running(stage: Stage, folder: Path, environment: dict[str, str], timeout_s: float) -> Iterator[Server]:
    """Start the stage's server and stop it at the end; ``OctavoError`` with its last words where it does not start."""
    log = folder / f"{stage.name.replace(' ', '-')}.log"
    began = time.perf_counter()
    with log.open("w") as errors:
        process = subprocess.Popen(
            serve_command(stage),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | environment,
            start_new_session=True,
        )
    try:
        yield Server(_address(process, log, timeout_s), time.perf_counter() - began, process, log)
    finally:
        _stop(process)


def _address(process: subprocess.Popen[str], log: Path, timeout_s: float) -> str:
    """The URL that the server prints when it accepts requests."""
    found: list[str] = []
    ready = threading.Event()

    def read() -> None:
        for line in process.stdout or ():
            if line.startswith("Serving ") and not found:
                found.append(line.split()[-1].removesuffix("/v1"))
                ready.set()
        ready.set()

    threading.Thread(target=read, name="octavo-table-output", daemon=True).start()
    in_time = ready.wait(timeout_s)
    if not found:
        words = " / ".join(log.read_text(errors="replace").strip().splitlines()[-LAST_LINES:])
        # The end of its output comes a moment before its end.
        state = "ended" if in_time else f"did not answer within {timeout_s:.0f} s"
        raise OctavoError(f"The server {state}: {words or 'it said nothing'}.", f"Its log is {log}.")
    return found[0]


def _stop(process: subprocess.Popen[str]) -> None:
    """End our own process group: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(number)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                continue
    if process.stdout is not None:
        process.stdout.close()


def prompts_of(row: Row, seed: int, ids: TokenIds) -> list[Sample]:
    """The row's requests; no other row's seed may be the same, or the prefix cache would know them."""
    load = row.load
    if load.prefix:
        return prefix_repetition_samples(
            load.num_prompts,
            num_prefixes=1,
            prefix_len=load.prefix,
            suffix_len=load.prompt,
            output_len=load.answer,
            ids=ids,
            seed=seed,
        )
    return random_samples(load.num_prompts, load.prompt, load.answer, ids=ids, seed=seed)


def online(row: Row, server: Server, seed: int, ids: TokenIds) -> dict[str, Any]:
    """Figures of one row: ``value`` in the row's unit, latencies in ms; any failed request is an ``OctavoError``."""
    load = row.load
    fields: dict[str, Any] = {"temperature": load.temperature, "ignore_eos": True}
    if load.top_p != 1.0:
        fields["top_p"] = load.top_p
    target = Target(server.url, model=first_model(server.url, {}), fields=fields)
    warmups = prompts_of(row, seed + 500_000, ids)[:1]
    run = run_loop(measure(target, prompts_of(row, seed, ids), Traffic(load.concurrency), warmups))
    failed = [answer for answer in run.answers if not answer.success]
    if failed:
        raise OctavoError(f"{len(failed)} of {len(run.answers)} requests failed: {failed[0].error}.")
    figures = metrics.summarize(run.answers, run.duration_s, metrics=("ttft", "itl"), percentiles=(50, 99))
    return {
        "value": figures["output_throughput"],
        "ttft_ms": (figures["p50_ttft_ms"], figures["p99_ttft_ms"]),
        "itl_ms": (figures["p50_itl_ms"], figures["p99_itl_ms"]),
        "seconds": run.duration_s,
        "client_cpu_s": run.client_cpu_s,
    }
