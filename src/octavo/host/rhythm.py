"""How long steps of some sizes take on the device at hand: measured once, before anybody is served.

What a few prompt tokens beside a decoding step cost differs: a large model waits for its weights anyway, a small one for
its many small kernels. ``almost_free`` finds the size of step at which a prompt token is cheapest while the step stays short.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from octavo.engine.executor.base import Executor
from octavo.engine.scheduler.pace import ALMOST_FREE
from octavo.protocol.generate import SamplingParams
from octavo.protocol.plan import SlotInit, StepPlan

SIZES = (256, 512, 768, 1024, 1536, 2048)  # tokens of a step with a prompt in it
ANSWERS = 32  # rows beside the prompt
SMOOTH_S = 0.010  # an answer that goes on every 10 ms looks steady
TIMES = 3  # of each size; the fastest counts
NEAR = 1.15  # a larger step that costs little more: prompts end in the step they came in, and the next ones only decode


def almost_free(
    executor: Executor, max_tokens: int, max_model_len: int, clock: Callable[[], float] = time.perf_counter
) -> int:
    """Tokens of a step with a prompt in it, even if few wait; ``ALMOST_FREE`` where every such step would be long."""
    sizes = [size for size in SIZES if size <= min(max_tokens, max_model_len - 1)]
    answers = min(ANSWERS, executor.num_slots - 1)
    if not sizes or answers < 1:
        return ALMOST_FREE
    alone = _seconds(executor, answers, 0, clock)
    return cheapest(
        alone, {size: _seconds(executor, answers, size - answers, clock) for size in sizes}, answers
    )


def cheapest(alone: float, seconds: dict[int, float], answers: int) -> int:
    """The size whose prompt tokens cost least beyond a step that only decodes, among steps no longer than ``SMOOTH_S``."""
    costs = [((took - alone) / (size - answers), size) for size, took in seconds.items() if took <= SMOOTH_S]
    return min(costs)[1] if costs else ALMOST_FREE


def _seconds(executor: Executor, answers: int, prompt: int, clock: Callable[[], float]) -> float:
    """The fastest of some equal steps; they scribble on page 0, which belongs to nobody yet."""
    return min(_step(executor, answers, prompt, clock) for _ in range(TIMES))


def _step(executor: Executor, answers: int, prompt: int, clock: Callable[[], float]) -> float:
    counts = [1] * answers + [prompt] * (prompt > 0)
    rows = list(range(len(counts)))
    greedy = SamplingParams(temperature=0.0)
    admits = [SlotInit(row, [0] * count, count, greedy, row, [0]) for row, count in zip(rows, counts)]
    plan = StepPlan(0, rows, [0] * len(rows), counts, [0] * len(rows), [True] * len(rows), admits, [], [])
    began = clock()
    executor.forward(plan)
    executor.sample([])
    executor.collect()
    return clock() - began
