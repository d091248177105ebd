"""``octavo bench front``: what the API side costs a token, with an engine that computes nothing.

Three processes: an engine that answers at once (or in steps of ``--step-ms``), the server as it is, and this client. The
figure is the CPU time of the server's processes over the tokens that they sent; the rate at which the busiest of them is
full, given a core of its own, follows from it.

    client (here)  ──HTTP──  octavo.bench.front_server serve (measured)  ──ZeroMQ──  octavo.bench.front_server engine
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from octavo.bench import metrics
from octavo.bench.load import random_samples
from octavo.bench.serve import Target, Traffic, measure, run_loop
from octavo.errors import OctavoError

MODEL = "qwen3-0.6b"


def cpu_seconds(pid: int) -> float:
    """User and system time of a process (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measured(
    streams: int, answer: int, rounds: int, step_ms: float, logprobs: bool, processes: int
) -> dict[str, float]:
    """Figures of one load on a server of its own."""
    command = [sys.executable, "-m", "octavo.bench.front_server", "serve"]
    command += [str(streams), str(step_ms), str(processes)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout is not None else ""
        if not line.startswith("Serving from "):
            raise OctavoError("The server did not start.", "Its messages above say why.")
        url = line.split()[-1].removesuffix("/v1")
        pids = [int(word) for word in line.split()[2:-2]]
        fields: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True} | (
            {"logprobs": 2} if logprobs else {}
        )
        target = Target(url, model=MODEL, fields=fields)
        samples = random_samples(streams * rounds, 32, answer)
        warmups = random_samples(streams, 32, 8, seed=1)
        run_loop(measure(target, warmups, Traffic(streams), warmups[:1]))
        before, own = [cpu_seconds(pid) for pid in pids], time.process_time()
        run = run_loop(measure(target, samples, Traffic(streams), []))
        own = time.process_time() - own
        shares = [cpu_seconds(pid) - start for pid, start in zip(pids, before, strict=True)]
        spent = sum(shares)
    finally:
        process.terminate()
        process.wait(20)
        if process.stdout is not None:
            process.stdout.close()
    figures = metrics.summarize(run.answers, run.duration_s)
    tokens = figures["total_output_tokens"]
    if figures["failed"] or not tokens:
        raise OctavoError(f"{figures['failed']} requests failed.")
    return {
        "streams": streams,
        "processes": processes,
        "busiest_share": max(shares) / spent if spent else 0.0,
        "tokens": tokens,
        "tokens_per_s": figures["output_throughput"],
        "server_us_per_token": 1e6 * spent / tokens,
        "client_us_per_token": 1e6 * own / tokens,
        "full_at_tokens_per_s": tokens / max(shares) if spent else 0.0,
    }


def main(argv: list[str]) -> int:
    """Print one line."""
    parser = argparse.ArgumentParser(prog="octavo bench front", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--streams", type=int, default=256, help="Clients at a time.")
    parser.add_argument("--answer", type=int, default=128, help="Tokens of an answer.")
    parser.add_argument("--rounds", type=int, default=4, help="Requests of each client.")
    parser.add_argument("--step-ms", type=float, default=0.0, help="How long the engine takes for a step.")
    parser.add_argument("--api-server-count", type=int, default=1, help="Front processes of the server.")
    parser.add_argument("--logprobs", action="store_true", help="Ask for two candidates a token.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead.")
    args = parser.parse_args(argv)
    found = measured(
        args.streams, args.answer, args.rounds, args.step_ms, args.logprobs, args.api_server_count
    )
    if args.json:
        print(json.dumps(found))
        return 0
    print(
        f"{args.streams} streams, {args.api_server_count} process(es): {found['tokens_per_s']:.0f} tokens/s; the server "
        f"takes {found['server_us_per_token']:.1f} us of CPU a token and is full at "
        f"{found['full_at_tokens_per_s']:.0f} tokens/s, with {found['busiest_share']:.0%} of the load on the busiest "
        f"process (client: {found['client_us_per_token']:.1f} us)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
