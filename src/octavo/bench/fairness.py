"""``octavo bench fairness``: what a tenant feels while another floods the engine, under each queue policy.

The engine is the real one over a runner that computes nothing, on a clock that only steps move: a step takes
``base + tokens x per_token`` milliseconds, as steps of a GPU do. One tenant ("flood") sends all its requests at once and
another ("quiet") sends bursts at fixed times. The table compares the quiet tenant's time to its first token with what
it has alone. The same arguments give the same numbers on every machine.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from octavo.engine.cache.layout import plan_layout
from octavo.engine.cache.spec import FullKV
from octavo.engine.core import EngineCore
from octavo.engine.executor.inline import InlineExecutor
from octavo.engine.executor.null import NullRunner
from octavo.engine.scheduler.queue import POLICIES
from octavo.engine.settings import EngineSettings
from octavo.protocol.generate import GenerateRequest, SamplingParams, Terms
from octavo.protocol.plan import StepPlan

PAGE_SIZE = 16
VOCAB_SIZE = 32_000


@dataclass(frozen=True)
class Load:
    """Requests of one tenant: ``bursts`` of ``burst`` requests, ``every_ms`` apart; lengths in tokens."""

    tenant: str
    bursts: int
    burst: int
    every_ms: float
    prompt: int
    answer: int


@dataclass(frozen=True)
class Machine:
    """How long a step takes, and how much goes into one."""

    base_ms: float = 4.0
    per_token_ms: float = 0.02
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_step_ms: float = 0.0


class FairnessRow(msgspec.Struct):
    """One line of the table; times in milliseconds, ``ratio`` against the same load alone."""

    policy: str
    load: str
    ttft_p50_ms: float
    ttft_p99_ms: float
    p50_ratio: float
    p99_ratio: float
    flood_s: float  # until the flood's last answer ended
    preemptions: int


class TimedRunner(NullRunner):
    """A runner that computes nothing, in the time a step would take."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(
            plan_layout({0: FullKV(PAGE_SIZE, 1)}),
            num_pages=65_536,
            num_slots=machine.max_num_seqs,
            vocab_size=VOCAB_SIZE,
        )
        self.machine = machine
        self.now_s = 0.0

    def forward(self, plan: StepPlan) -> None:
        """See ``Runner.forward``; the clock goes on by the length of the step."""
        super().forward(plan)
        self.now_s += (self.machine.base_ms + self.machine.per_token_ms * sum(plan.num_tokens)) / 1e3


class Simulation:
    """One engine on its own clock."""

    def __init__(self, policy: str, machine: Machine) -> None:
        self.runner = TimedRunner(machine)
        self.core = EngineCore(
            InlineExecutor(self.runner),
            EngineSettings(
                max_model_len=16_384,
                max_num_seqs=machine.max_num_seqs,
                max_num_batched_tokens=machine.max_num_batched_tokens,
                vocab_size=VOCAB_SIZE,
                scheduling_policy=policy,
                max_step_ms=machine.max_step_ms,
            ),
            clock=lambda: self.runner.now_s,
        )

    def run(self, loads: Sequence[Load]) -> tuple[dict[str, list[float]], dict[str, float]]:
        """By tenant: the times to the first token (s) of every request, and when the last answer ended."""
        arrivals = sorted(
            (burst * load.every_ms / 1e3, load.tenant, index, load)
            for load in loads
            for burst in range(load.bursts)
            for index in range(load.burst)
        )
        sent: dict[int, tuple[str, float]] = {}
        ttft: dict[str, list[float]] = {load.tenant: [] for load in loads}
        ended: dict[str, float] = {}
        while arrivals or self.core.has_work:
            while arrivals and arrivals[0][0] <= self.runner.now_s:
                at_s, _, _, load = arrivals.pop(0)
                self._submit(len(sent), load)
                sent[len(sent)] = (load.tenant, at_s)
            if not self.core.has_work:
                self.runner.now_s = arrivals[0][0]
                continue
            for delta in self.core.step():
                tenant, at_s = sent[delta.id]
                if delta.times is not None:
                    ttft[tenant].append(self.runner.now_s - at_s)
                if delta.finish_reason is not None:
                    ended[tenant] = self.runner.now_s
        return ttft, ended

    def _submit(self, id: int, load: Load) -> None:
        prompt = [(id * 7919 + place * 31) % VOCAB_SIZE for place in range(load.prompt)]
        self.core.submit(
            GenerateRequest(
                id=id,
                prompt_token_ids=prompt,
                sampling=SamplingParams(max_tokens=load.answer, ignore_eos=True, seed=id),
                terms=Terms(tenant=load.tenant),
            )
        )


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def run(quiet: Load, flood: Load, machine: Machine, policies: Sequence[str] = POLICIES) -> list[FairnessRow]:
    """The quiet tenant alone, then beside the flood under every policy."""
    rows: list[FairnessRow] = []
    for policy in ("alone", *policies):
        simulation = Simulation("fcfs" if policy == "alone" else policy, machine)
        ttft, ended = simulation.run([quiet] if policy == "alone" else [flood, quiet])
        found = ttft[quiet.tenant]
        p50, p99 = (1e3 * percentile(found, share) for share in (0.5, 0.99))
        alone = rows[0] if rows else None
        rows.append(
            FairnessRow(
                policy,
                f"{quiet.bursts} x {quiet.burst}",
                p50,
                p99,
                p50 / alone.ttft_p50_ms if alone else 1.0,
                p99 / alone.ttft_p99_ms if alone else 1.0,
                ended.get(flood.tenant, 0.0),
                simulation.core.stats().num_preemptions,
            )
        )
    return rows


def table(rows: Sequence[FairnessRow]) -> str:
    """The rows as text."""
    head = f"{'policy':<9} {'quiet load':>10} {'TTFT p50 ms':>12} {'p99 ms':>9} {'p50 / alone':>12} "
    lines = [head + f"{'p99 / alone':>12} {'flood ends s':>13} {'preempted':>10}"]
    for row in rows:
        lines.append(
            f"{row.policy:<9} {row.load:>10} {row.ttft_p50_ms:>12.1f} {row.ttft_p99_ms:>9.1f} "
            f"{row.p50_ratio:>12.2f} {row.p99_ratio:>12.2f} {row.flood_s:>13.1f} {row.preemptions:>10}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``octavo bench fairness``."""
    parser = argparse.ArgumentParser(
        prog="octavo bench fairness", description="A quiet tenant beside a flood, on a simulated clock."
    )
    machine = Machine()
    parser.add_argument("--flood", type=int, default=200, help="Requests that the flood sends at once.")
    parser.add_argument("--bursts", type=int, default=25, help="How often the quiet tenant sends.")
    parser.add_argument("--burst", type=int, nargs="+", default=[1, 8], help="Requests it sends at a time.")
    parser.add_argument("--every-ms", type=float, default=1000.0, help="Time between its bursts.")
    parser.add_argument("--prompt", type=int, default=512, help="Tokens of its prompts.")
    parser.add_argument("--answer", type=int, default=32, help="Tokens of its answers.")
    parser.add_argument("--flood-prompt", type=int, default=512, help="Tokens of the flood's prompts.")
    parser.add_argument("--flood-answer", type=int, default=512, help="Tokens of the flood's answers.")
    parser.add_argument("--base-ms", type=float, default=machine.base_ms, help="Time of an empty step.")
    parser.add_argument("--token-ms", type=float, default=machine.per_token_ms, help="Time of a token.")
    parser.add_argument("--max-num-seqs", type=int, default=machine.max_num_seqs, help="Places.")
    parser.add_argument(
        "--max-num-batched-tokens", type=int, default=machine.max_num_batched_tokens, help="Tokens of a step."
    )
    parser.add_argument("--max-step-ms", type=float, default=0.0, help="Bound of mixed steps; 0: none.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    options = parser.parse_args(argv)
    machine = Machine(
        options.base_ms,
        options.token_ms,
        options.max_num_seqs,
        options.max_num_batched_tokens,
        options.max_step_ms,
    )
    flood = Load("flood", 1, options.flood, 0.0, options.flood_prompt, options.flood_answer)
    rows: list[FairnessRow] = []
    for burst in options.burst:
        quiet = Load("quiet", options.bursts, burst, options.every_ms, options.prompt, options.answer)
        rows += run(quiet, flood, machine)
    print(json.dumps(msgspec.to_builtins(rows)) if options.json else table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
