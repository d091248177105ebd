"""Small engines without maths, for the tests of clients and processes."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from octavo.engine.cache.layout import plan_layout
from octavo.engine.cache.spec import ChunkedKV, FullKV, StateKV, WindowKV
from octavo.engine.client.messages import ProgressCall
from octavo.engine.client.serve import run_engine
from octavo.engine.core import EngineCore
from octavo.engine.executor.base import Seat, Started
from octavo.engine.executor.inline import InlineExecutor
from octavo.engine.executor.null import NullRunner, null_token
from octavo.engine.settings import EngineSettings
from octavo.errors import ModelNotFoundError
from octavo.protocol.generate import GenerateRequest, SamplingParams
from octavo.protocol.plan import StepPlan

VOCAB = 1000
SECRET = 12345


class FailingRunner(NullRunner):
    """Breaks at one step."""

    fail_at = -1
    delay_s = 0.0
    slow_at = -1

    def forward(self, plan: StepPlan) -> None:
        while plan.step == self.slow_at:
            time.sleep(0.05)
        if plan.step == self.fail_at:
            raise RuntimeError("the device fell over")
        time.sleep(self.delay_s)
        super().forward(plan)


def null_core(
    *, fail_at: int = -1, delay_s: float = 0.0, num_pages: int = 64, num_slots: int = 8, **changes: Any
) -> EngineCore:
    runner = FailingRunner(
        plan_layout({0: FullKV(16, 64)}), num_pages=num_pages, num_slots=num_slots, vocab_size=VOCAB
    )
    runner.fail_at = fail_at
    runner.delay_s = delay_s
    facts: dict[str, Any] = {
        "max_model_len": 256,
        "max_num_seqs": num_slots,
        "max_num_batched_tokens": 64,
        "vocab_size": VOCAB,
        "model": "null",
    }
    return EngineCore(InlineExecutor(runner), EngineSettings(**{**facts, **changes}))


def request(id: int, prompt: list[int] | None = None, **sampling: Any) -> GenerateRequest:
    params = {"max_tokens": 8, "seed": id, **sampling}
    return GenerateRequest(
        id=id, prompt_token_ids=prompt or [1, 2, 3, id % VOCAB], sampling=SamplingParams(**params)
    )


def expected(req: GenerateRequest) -> list[int]:
    """What a null engine answers."""
    first = len(req.prompt_token_ids)
    seed = req.sampling.seed
    assert seed is not None
    return [null_token(seed, first + i, VOCAB) for i in range(req.sampling.max_tokens or 0)]


def make_runner(arguments: dict[str, Any], seat: Seat) -> Started:
    """Factory for worker processes; each rank has its own number of pages."""
    rank = seat.rank
    seat.report("waking up", 1, 1)
    if arguments.get("fail_start_of") == rank:
        raise ModelNotFoundError("There is no model 'x'.", "Name another.")
    while arguments.get("hang_start_of") == rank:
        time.sleep(0.05)
    runner = FailingRunner(
        plan_layout(
            {0: FullKV(16, 64), 1: WindowKV(16, 64, 40), 2: ChunkedKV(16, 64, 32), 3: StateKV(16, 9)}
        ),
        num_pages=64 + rank,
        num_slots=8,
        vocab_size=VOCAB,
    )
    if rank == 0:
        runner.slow_at = arguments.get("slow_at", -1)
    if arguments.get("fail_rank", 0) == rank:
        runner.fail_at = arguments.get("fail_at", -1)
    return Started(runner, b"facts of the null engine")


def build(options: bytes, progress: ProgressCall) -> EngineCore:
    """The engine process's builder for these tests; options are a JSON object."""
    wanted = json.loads(options)
    progress("loading", 1, 2)
    progress("loading", 2, 2)
    if wanted.pop("missing", False):
        raise ModelNotFoundError("There is no model 'x'.", "Name another.")
    if wanted.pop("crash", False):
        os._exit(7)
    if wanted.pop("bug", False):
        raise ValueError("a bug")
    return null_core(**wanted)


if __name__ == "__main__":
    raise SystemExit(run_engine(sys.argv[1], build))
