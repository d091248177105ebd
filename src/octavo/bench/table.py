"""``octavo bench table``: proofs first, then every row of the house's table of one GPU, beside peer, target and floor.

It starts ``octavo serve`` itself with random weights, loads it over HTTP (every row with prompts of its own), stops it,
and runs the offline rows in a process of their own, so at any time one process holds the device. ``start/cold`` begins
with an empty folder of compiled kernels, ``start/second`` with the one that the first left. Rows that the time does not
allow are listed as not run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec

from octavo import __version__
from octavo.bench.floors import Ceilings, Costs
from octavo.bench.load import TokenIds
from octavo.bench.table_online import online, running
from octavo.bench.table_rows import Load, Order, Row, Stage, stages
from octavo.errors import OctavoError, UsageError
from octavo.files.dummy import PRESETS

Print = Callable[[str], None]


@dataclass
class Result:
    """A row's outcome; ``value`` None = not run, ``why`` says so. ``floor`` is what the measured rates allow."""

    row: Row
    value: float | None = None
    why: str = ""
    must: float = 0.0
    floor: float = 0.0
    ttft_ms: tuple[float, float] = (0.0, 0.0)
    itl_ms: tuple[float, float] = (0.0, 0.0)
    seconds: float = 0.0

    @property
    def misses(self) -> list[str]:
        """What was to be reached and was not."""
        row = self.row
        found: list[str] = []
        if self.value is None:
            return found
        lower = row.unit == "s"
        if self.value > self.must if lower else self.value < self.must:
            found.append(f"{self.must:g} {row.unit}")
        for name, limit, value in (
            ("TTFT p50", row.must_ttft_p50_ms, self.ttft_ms[0]),
            ("ITL p99", row.must_itl_p99_ms, self.itl_ms[1]),
        ):
            if limit and value > limit:
                found.append(f"{name} {limit:g} ms")
        return found


@dataclass
class Table:
    """Everything a run has found so far; written after each row."""

    facts: dict[str, Any]
    ceilings: Ceilings | None = None
    findings: list[dict[str, Any]] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    timelines: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        """All of it, as plain values."""
        rows = [
            msgspec.to_builtins(result) | {"misses": result.misses, "ratio": ratio(result)}
            for result in self.results
        ]
        rest = {"findings": self.findings, "timelines_s": self.timelines, "errors": self.errors}
        return self.facts | {"ceilings": msgspec.to_builtins(self.ceilings)} | rest | {"rows": rows}

    def value(self, name: str) -> float | None:
        """A row's figure, where it has run."""
        return next((result.value for result in self.results if result.row.name == name), None)


@dataclass
class Clock:
    """How much of the time that was given is left."""

    ends: float

    @classmethod
    def of(cls, minutes: float) -> Clock:
        """From now on."""
        return cls(time.monotonic() + 60 * minutes)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()


class Runner:
    """Runs stages into a ``Table``; ``save`` is called after each row."""

    def __init__(
        self, table: Table, clock: Clock, seed: int, ids: TokenIds, save: Callable[[], None]
    ) -> None:
        self.table = table
        self.clock = clock
        self.seed = seed
        self.ids = ids
        self.save = save

    def check(self, prove: bool, tell: Print) -> None:
        """Rates, and with ``prove`` the proofs, in a process of their own."""
        command = [sys.executable, "-m", "octavo.bench.table_check", *([] if prove else ["--rates"])]
        for line in lines_of(command, {}, self.clock.left, self.table.errors):
            if "rates" in line:
                rates = line["rates"]
                self.table.ceilings = Ceilings(rates["copy"], rates["bf16"], rates["fp8"])
                self.table.facts |= {"device": rates["device"], "versions": rates["versions"]}
                tell(rates_line(rates))
            else:
                found = line["finding"] | {"holds": line["holds"]}
                self.table.findings.append(found)
                tell(finding_line(found))
        self.save()

    def stage(self, stage: Stage, folder: Path, tell: Print) -> None:
        """One engine and its rows; an engine that fails leaves the other stages standing."""
        least = stage.start_estimate_s + min((row.estimate_s for row in stage.rows), default=0.0)
        if self.clock.left < least:
            for row in stage.rows:
                self._skip(row, f"time: {self.clock.left:.0f} s left, about {least:.0f} needed", tell)
            return
        environment = {"TRITON_CACHE_DIR": str(folder / "triton")}
        work = self._serve if stage.kind == "serve" else self._offline
        try:
            work(stage, folder, environment, tell)
        except OctavoError as error:
            self.table.errors.append(f"{stage.name}: {error}")
            known = {result.row.name for result in self.table.results}
            for row in stage.rows:
                if row.name not in known:
                    self._skip(row, f"failed: {error}", tell)
        self.save()

    def _serve(self, stage: Stage, folder: Path, environment: dict[str, str], tell: Print) -> None:
        with running(stage, folder, environment, self.clock.left) as server:
            if stage.start is not None:
                name, peer, must = stage.start
                row = Row(name, Load(0, 0), peer, must, unit="s")
                self._add(stage, row, {"value": server.start_s}, tell)
            for row in stage.rows:
                if self.clock.left < row.estimate_s:
                    self._skip(row, "time", tell)
                    continue
                self.seed += 1
                self._add(stage, row, online(row, server, 1000 * self.seed, self.ids), tell)

    def _offline(self, stage: Stage, folder: Path, environment: dict[str, str], tell: Print) -> None:
        rows, planned = [], stage.start_estimate_s
        for row in stage.rows:
            planned += row.estimate_s
            if planned > self.clock.left:
                self._skip(row, "time", tell)
            else:
                rows.append(row)
        self.seed += 1
        order = Order(replace(stage, rows=tuple(rows)), 1000 * self.seed, self.ids.first, self.ids.count)
        raw = msgspec.json.encode(order).decode()
        command = [sys.executable, "-m", "octavo.bench.table_offline", raw]
        waiting = {row.name: row for row in rows}
        errors: list[str] = []
        for line in lines_of(command, environment, self.clock.left, errors):
            if "row" in line:
                self._add(stage, waiting.pop(line["row"]), line, tell)
            else:
                self.table.timelines[stage.name] = line
        if waiting:
            raise OctavoError(errors[-1] if errors else "The process ended early.")

    def _add(self, stage: Stage, row: Row, figures: dict[str, Any], tell: Print) -> None:
        must = row.must
        if row.share_of is not None:
            name, share = row.share_of
            must = share * (self.table.value(name) or row.must / share)
        result = Result(row, must=must, floor=self._floor(stage, row), **_kept(figures))
        self.table.results.append(result)
        tell(result_line(result))
        self.save()

    def _skip(self, row: Row, why: str, tell: Print) -> None:
        self.table.results.append(Result(row, None, f"not run ({why})", row.must))
        tell(result_line(self.table.results[-1]))

    def _floor(self, stage: Stage, row: Row) -> float:
        """The figure that the measured rates allow; 0 where they are not known, or for a start."""
        config = PRESETS.get(stage.model)
        if self.table.ceilings is None or config is None or row.unit == "s":
            return 0.0
        return floor_of(Costs.of(config, stage.quantization == "fp8"), row, self.table.ceilings)


def floor_of(costs: Costs, row: Row, ceilings: Ceilings) -> float:
    """A row's figure at the floor: prompts at the matrix rate, then all rows of a wave decoding together."""
    load = row.load
    seconds = costs.load_s(load.concurrency, load.prompt, load.prefix, load.answer, ceilings)
    if row.unit == "req/s":
        return load.concurrency / seconds
    if row.unit == "prompt tok/s":
        return load.prompt / costs.prefill_s(load.prompt, load.prefix, ceilings)
    return load.concurrency * load.answer / seconds


def ratio(result: Result) -> float:
    """How much better than the peer: above 1 is better, for seconds too; 0 where not run."""
    if not result.value:
        return 0.0
    peer = result.row.peer
    return peer / result.value if result.row.unit == "s" else result.value / peer


def lines_of(
    command: list[str], environment: dict[str, str], timeout_s: float, errors: list[str]
) -> Iterator[dict[str, Any]]:
    """JSON objects that a child prints, as they come; what it says when it fails goes to ``errors``."""
    with tempfile.TemporaryFile("w+") as words:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=words, text=True, env=os.environ | environment
        )
        timer = threading.Timer(max(1.0, timeout_s), child.kill)
        timer.start()
        try:
            for line in child.stdout or ():
                if line.startswith("{"):
                    yield json.loads(line)
            if child.wait() != 0:
                words.seek(0)
                last = words.read().strip().splitlines()[-3:]
                late = "it was stopped when the time was over; " if not timer.is_alive() else ""
                errors.append(f"{command[2]}: {late}{' / '.join(last) or 'no word'}")
        finally:
            timer.cancel()
            child.kill()
            child.wait()
            if child.stdout is not None:
                child.stdout.close()


def rates_line(rates: dict[str, Any]) -> str:
    """The device and its ceilings."""
    versions = ", ".join(f"{name} {version}" for name, version in rates["versions"].items())
    return (
        f"{rates['device']}: copy {rates['copy'] / 1e9:.0f} GB/s, bf16 {rates['bf16'] / 1e12:.0f} TFLOP/s, "
        f"fp8 {rates['fp8'] / 1e12:.0f} TFLOP/s; {versions}"
    )


def finding_line(finding: dict[str, Any]) -> str:
    """One proof."""
    verdict = "holds" if finding["holds"] else "WRONG"
    note = f" ({finding['note']})" if finding["note"] else ""
    return f"check/{finding['name']:<12} {verdict}: error {finding['error']:.5f}, at most {finding['bound']:.5f}{note}"


HEADER = (
    f"{'row':<18}{'ours':>10}{'peer':>9}{'must':>9}{'ratio':>7}{'floor':>7}  {'TTFT p50/p99':<15}{'(peer)':<13}"
    f"{'ITL p50/p99':<13}{'(peer)':<11}{'prompts':<12}verdict"
)


def result_line(result: Result) -> str:
    """One row of the table."""
    row = result.row
    if result.value is None:
        return f"{row.name:<18}{'-':>10}{row.peer:>9g}{result.must:>9.0f}  {result.why}"
    share = f"{result.value / result.floor:.0%}" if result.floor else "-"
    count = "" if row.unit == "s" else str(row.load.num_prompts)
    if row.load.full_count:
        count += f" of {row.load.full_count}"
    misses = result.misses
    digits = 1 if row.unit in ("s", "req/s") else 0
    return (
        f"{row.name:<18}{result.value:>10.{digits}f}{row.peer:>9g}{result.must:>9.0f}{ratio(result):>7.2f}{share:>7}  "
        f"{_pair(result.ttft_ms, 0):<15}{_pair(row.peer_ttft_ms, 0):<13}{_pair(result.itl_ms, 1):<13}"
        f"{_pair(row.peer_itl_ms, 1):<11}{count:<12}{'MISSED ' + ', '.join(misses) if misses else 'met'}"
        + ("" if row.unit == "tok/s" else f" [{row.unit}]")
    )


def _pair(values: tuple[float, float], digits: int) -> str:
    return f"{values[0]:.{digits}f}/{values[1]:.{digits}f}" if any(values) else ""


def _kept(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: figures[name] for name in ("value", "ttft_ms", "itl_ms", "seconds") if name in figures}


def chosen(patterns: Iterable[str], everything: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Stages with the rows that match any pattern; ``UsageError`` where a pattern matches nothing."""
    wanted = list(patterns)
    names = [row.name for stage in everything for row in stage.rows]
    names += [stage.start[0] for stage in everything if stage.start] + ["check/all"]
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"--rows {pattern!r} matches no row.", f"Rows: {', '.join(names)}.")
    found = []
    for stage in everything:
        rows = tuple(row for row in stage.rows if any(fnmatchcase(row.name, p) for p in wanted))
        start = stage.start if stage.start and any(fnmatchcase(stage.start[0], p) for p in wanted) else None
        if rows or start:
            found.append(replace(stage, rows=rows, start=start))
    return tuple(found)


def commit() -> str:
    """The commit of the source tree this runs from, or ""."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            check=False,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="octavo bench table", description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--rows", default="*", help="Rows to run, comma separated patterns like 8b/*,start/*,check/all."
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="Time for everything; what does not fit is left out."
    )
    parser.add_argument("--output", type=Path, help="JSON file, written after every row.")
    parser.add_argument(
        "--folder", type=Path, help="Where server logs and compiled kernels go (default: temporary)."
    )
    parser.add_argument("--commit", default="", help="Commit to note in the result (default: asked of git).")
    parser.add_argument("--seed", type=int, default=1, help="Rows take seeds from here on, each its own.")
    parser.add_argument("--list", action="store_true", help="List the rows and leave.")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Exit status: 0, 1 where a proof failed or a stage broke, 2 without a GPU."""
    args = parse(argv)
    patterns = [pattern.strip() for pattern in args.rows.split(",") if pattern.strip()]
    plan = chosen(patterns, stages())
    if args.list:
        print("\n".join(row.name for stage in plan for row in stage.rows))
        return 0
    facts = {"version": __version__, "commit": args.commit or commit(), "machine": platform.machine()}
    table = Table(facts)

    def save() -> None:
        if args.output:
            args.output.write_text(json.dumps(table.json(), indent=1) + "\n", encoding="utf-8")

    def tell(line: str) -> None:
        print(line, flush=True)

    runner = Runner(table, Clock.of(args.minutes), args.seed, TokenIds(), save)
    prove = any(fnmatchcase("check/all", pattern) for pattern in patterns)
    with tempfile.TemporaryDirectory(prefix="octavo-table-") as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        runner.check(prove, tell)
        if table.ceilings is None:
            print(f"octavo bench table: {'; '.join(table.errors) or 'no rates'}", file=sys.stderr)
            return 2
        tell(HEADER)
        for stage in plan:
            runner.stage(stage, folder, tell)
    for error in table.errors:
        print(f"error: {error}", file=sys.stderr)
    return 1 if table.errors or not all(finding["holds"] for finding in table.findings) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
