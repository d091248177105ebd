"""``octavo bench step``: what the engine itself costs a step, with a runner that computes nothing.

Every sequence decodes without end; a step is ``EngineCore.step`` as a server runs it: schedule, plan columns, page
bookkeeping (a page of 16 tokens a sequence fills every 16 steps and is hashed), stop checks, deltas. The null runner's
own time (making up tokens) is measured apart and subtracted in the column that counts. Times are CPU time (the engine
is one thread that never waits here, so on an idle machine wall clock is the same) of the best of several rounds, each
long enough to contain every sequence's page events in their right share: other load on the machine still slows a
round through caches and clock, and only the fastest one is near the truth.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

import msgspec

from octavo.engine.cache.layout import CacheGroup, CacheLayout
from octavo.engine.cache.spec import FullKV, KVSpec, WindowKV
from octavo.engine.core import EngineCore
from octavo.engine.executor.inline import InlineExecutor
from octavo.engine.executor.null import NullRunner
from octavo.engine.settings import EngineSettings
from octavo.protocol.generate import GenerateRequest, SamplingParams
from octavo.protocol.plan import GrammarMask, StepPlan, StepResult

PAGE_SIZE = 16
PROMPT_TOKENS = 100
VOCAB_SIZE = 50_000
SIZES = (1, 32, 256, 1024)


class StepRow(msgspec.Struct):
    """One line of the table; times in milliseconds a step, ``per_sequence_us`` in microseconds."""

    num_seqs: int
    num_groups: int
    engine_ms: float
    null_runner_ms: float
    per_sequence_us: float


class TimedExecutor:
    """A null runner that keeps the time spent inside it."""

    def __init__(self, runner: NullRunner) -> None:
        self.runner = runner
        self.layout = runner.layout
        self.num_pages = runner.num_pages
        self.num_slots = runner.num_slots
        self.spent_s = 0.0

    def forward(self, plan: StepPlan) -> None:
        """See ``Executor.forward``."""
        begin = time.process_time()
        self.runner.forward(plan)
        self.spent_s += time.process_time() - begin

    def sample(self, masks: list[GrammarMask]) -> None:
        """See ``Executor.sample``."""
        begin = time.process_time()
        self.runner.sample(masks)
        self.spent_s += time.process_time() - begin

    def collect(self) -> StepResult:
        """See ``Executor.collect``."""
        return self.runner.collect()

    def close(self) -> None:
        """See ``Executor.close``."""
        self.runner.close()


def measure(num_seqs: int, *, num_groups: int = 1, overlap: bool = True, rounds: int = 12) -> StepRow:
    """Time steady decoding of ``num_seqs`` sequences; more than one group adds sliding windows."""
    round_steps = PAGE_SIZE * 4
    length = PROMPT_TOKENS + 200 + round_steps * (rounds + 1)
    specs: list[KVSpec] = [FullKV(PAGE_SIZE, 1), *[WindowKV(PAGE_SIZE, 1, 128)] * (num_groups - 1)]
    layout = CacheLayout(tuple(CacheGroup(spec, (i,)) for i, spec in enumerate(specs)), PAGE_SIZE, 1)
    runner = NullRunner(
        layout,
        num_pages=num_seqs * layout.pages_for(length) + 64,
        num_slots=num_seqs,
        vocab_size=VOCAB_SIZE,
    )
    executor = TimedExecutor(runner)
    core = EngineCore(
        InlineExecutor(executor),
        EngineSettings(
            max_model_len=length,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=max(2048, num_seqs),
            vocab_size=VOCAB_SIZE,
            overlap=overlap,
            max_queue_len=num_seqs,
        ),
    )
    for id in range(num_seqs):
        # Lengths differ, so that page events spread evenly over the steps as they do in a server.
        prompt = [(id * 7 + i) % VOCAB_SIZE for i in range(PROMPT_TOKENS + id % PAGE_SIZE)]
        sampling = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
        core.submit(GenerateRequest(id=id, prompt_token_ids=prompt, sampling=sampling))
    while len(core.scheduler.decoding) < num_seqs or core.scheduler.waiting:
        core.step()
    best = (float("inf"), 0.0)
    for _ in range(rounds):
        executor.spent_s = 0.0
        begin = time.process_time()
        for _ in range(round_steps):
            core.step()
        total = time.process_time() - begin
        best = min(best, (total - executor.spent_s, executor.spent_s))
    core.check()
    core.close()
    engine_ms, null_ms = (1000 * seconds / round_steps for seconds in best)
    return StepRow(num_seqs, num_groups, engine_ms, null_ms, 1000 * engine_ms / num_seqs)


def run(
    sizes: Sequence[int] = SIZES, *, num_groups: int = 1, overlap: bool = True, rounds: int = 12
) -> list[StepRow]:
    """One row a size."""
    return [measure(size, num_groups=num_groups, overlap=overlap, rounds=rounds) for size in sizes]


def table(rows: Sequence[StepRow]) -> str:
    """The rows as text."""
    lines = [
        f"{'sequences':>9} {'groups':>6} {'engine ms/step':>14} {'us/sequence':>11} {'null runner ms':>14}"
    ]
    for row in rows:
        lines.append(
            f"{row.num_seqs:>9} {row.num_groups:>6} {row.engine_ms:>14.3f} {row.per_sequence_us:>11.2f} "
            f"{row.null_runner_ms:>14.3f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``octavo bench step``."""
    parser = argparse.ArgumentParser(
        prog="octavo bench step", description="Scheduler and bookkeeping a step."
    )
    parser.add_argument("--num-seqs", type=int, nargs="+", default=list(SIZES), help="Numbers of sequences.")
    parser.add_argument(
        "--num-groups", type=int, default=1, help="Cache groups; those after the first are windows."
    )
    parser.add_argument("--rounds", type=int, default=12, help="Rounds; the best one counts.")
    parser.add_argument(
        "--overlap", action=argparse.BooleanOptionalAction, default=True, help="Depth 1 or 0."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    options = parser.parse_args(argv)
    rows = run(
        options.num_seqs, num_groups=options.num_groups, overlap=options.overlap, rounds=options.rounds
    )
    print(json.dumps(msgspec.to_builtins(rows)) if options.json else table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
