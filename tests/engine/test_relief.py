"""An executor that takes over: nobody's answer suffers, and nothing of the old cache is used."""

from __future__ import annotations

import pytest

from octavo.engine.cache.layout import plan_layout
from octavo.engine.cache.spec import FullKV
from octavo.engine.core import EngineCore
from octavo.engine.executor.inline import InlineExecutor
from octavo.engine.executor.null import NullRunner
from octavo.engine.relief import Successor
from octavo.engine.settings import EngineSettings
from octavo.protocol.control import CheckPool
from octavo.protocol.generate import GenerateRequest, SamplingParams
from octavo.protocol.plan import StepPlan


class Watched(NullRunner):
    """Remembers what it was asked to compute."""

    def __init__(self) -> None:
        super().__init__(plan_layout({0: FullKV(16, 4)}), num_pages=40, num_slots=4, vocab_size=50)
        self.plans: list[StepPlan] = []
        self.closed = False

    def forward(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        super().forward(plan)

    def close(self) -> None:
        self.closed = True


class Ready:
    """A relief that is ready from the n-th question on."""

    def __init__(self, successor: Successor, after: int) -> None:
        self.successor, self.left, self.closed = successor, after, False

    @property
    def ready(self) -> bool:
        self.left -= 1
        return self.left < 0

    def take(self) -> Successor:
        return self.successor

    def close(self) -> None:
        self.closed = True


def settings(**values: object) -> EngineSettings:
    given = {
        "max_model_len": 128,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "vocab_size": 50,
        **values,
    }
    return EngineSettings(**given)  # type: ignore[arg-type]


def answers(core: EngineCore) -> dict[int, list[int]]:
    """Three requests, run to their ends, with the pool proved after every step."""
    out: dict[int, list[int]] = {}
    for key in range(3):
        sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        core.submit(GenerateRequest(id=key, prompt_token_ids=[key] * (17 + key), sampling=sampling))
    while core.has_work:
        for delta in core.step():
            assert delta.finish_reason in (None, "length"), delta
            out.setdefault(delta.id, []).extend(delta.tokens)
        core.control(CheckPool())
    return out


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("after", [0, 1, 4, 9])
def test_requests_in_flight_move_and_lose_nothing(after: int, overlap: bool) -> None:
    alone = EngineCore(InlineExecutor(Watched()), settings())
    want = answers(alone)
    first, second = Watched(), Watched()
    core = EngineCore(InlineExecutor(first), settings(overlap=overlap, kernels={"path": "torch"}))
    core.relief = Ready(Successor(InlineExecutor(second), settings(kernels={"path": "compiled"})), after)
    assert answers(core) == want
    assert core.relief is None and first.closed and not second.closed
    assert core.info.kernels == {"path": "compiled"}
    # Everything that goes on there begins at its first token: no page of the old runner is read.
    seen: set[int] = set()
    for plan in second.plans:
        for slot, start in zip(plan.slots, plan.starts):
            assert start == 0 or slot in seen
            seen.add(slot)


def test_an_engine_that_ends_gives_its_relief_up() -> None:
    core = EngineCore(InlineExecutor(Watched()), settings())
    relief = core.relief = Ready(Successor(InlineExecutor(Watched()), settings()), 99)
    core.close()
    assert relief.closed
