"""What a runner needs beside weights and pages, measured on a runner over two pages before the real one is made.

largest step   full token budget in one long prompt and as many answers as there are slots; every row asks for all that
               costs memory: a random draw with filters, penalties, bias, a grammar's mask, log probabilities, and
               those of its prompt
graphs         the first recording makes the shared pool, each further one adds its outputs and the driver's records
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import structs

from octavo.protocol.generate import SamplingParams
from octavo.protocol.plan import GrammarMask, SlotInit, StepPlan
from octavo.runner.graphs import StepGraphs
from octavo.runner.runner import TorchRunner
from octavo.runner.sizes import recorded_sizes

LOGPROBS = 20  # the most that the front half lets through
SLACK_BYTES = 64 << 20  # what the allocator rounds up and libraries allocate when they are first used
TRIALS = 3  # recordings whose mean growth stands for all others


@dataclass(frozen=True)
class Peak:
    """Bytes above weights and pages: of the largest step, and of all recorded graphs."""

    step_bytes: int = 0
    graph_bytes: int = 0


def shares(tokens: int, rows: int, longest: int) -> list[int]:
    """``tokens`` over ``rows``: one each, the rest to the first ones, none above ``longest``."""
    counts, left = [1] * rows, tokens - rows
    for row in range(rows):
        more = max(0, min(left, longest - 1))
        counts[row] += more
        left -= more
    return counts


def run_largest_step(runner: TorchRunner, max_model_len: int, scored: int | None = None) -> None:
    """The step of the drawing above, from plan to result; ``scored``: how many rows' prompts are, if not all."""
    rows = min(runner.num_slots, runner.max_tokens)
    counts = shares(runner.max_tokens, rows, max_model_len)
    asked = min(LOGPROBS, runner.sampler.vocab_size)
    sampling = SamplingParams(
        temperature=1.0,
        top_p=0.9,
        top_k=20,
        min_p=0.01,
        repetition_penalty=1.1,
        logit_bias={0: 1.0},
        logprobs=asked,
        prompt_logprobs=asked,
    )
    unscored = structs.replace(sampling, prompt_logprobs=None)
    asks = [sampling if scored is None or i < scored else unscored for i in range(rows)]
    # One token more is known than computed, so that every computed one has a successor to score.
    admits = [SlotInit(i, [0] * (n + 1), n + 1, asks[i], 0, []) for i, n in enumerate(counts)]
    every, none = list(range(rows)), [0] * rows
    plan = StepPlan(0, every, none, counts, none, [True] * rows, admits, [], [])
    words = b"\xff" * (4 * -(-runner.sampler.vocab_size // 32))
    runner.forward(plan)
    runner.sample([GrammarMask(row, words) for row in every])
    runner.collect()


def graph_bytes(runner: TorchRunner, max_model_len: int) -> int:
    """Bytes that the recordings of the real runner will hold: some are made here, the others are reckoned from them."""
    platform = runner.platform
    mixed, decode = recorded_sizes(runner.num_slots, runner.max_tokens)
    graphs = StepGraphs(runner.network, runner.slots, runner.builder, platform, max_model_len)
    marks = [platform.free_bytes()]

    def mark() -> None:
        platform.synchronize()
        marks.append(platform.free_bytes())

    pool = graphs.mixed.capture(mixed[-1:], None, mark)
    graphs.decode.capture(decode[:TRIALS], pool, mark)
    if len(marks) < 2:
        return 0  # a device without graphs
    first = max(0, marks[0] - marks[1])
    growth = max(0, marks[1] - marks[-1]) / max(1, len(marks) - 2)
    hidden = runner.network.spec.embedding.hidden * runner.network.dtype.itemsize
    outputs = sum(map(graphs.mixed.rows_of, mixed)) + sum(decode)
    records = int(growth * (len(mixed) + len(decode)))
    return first + records + outputs * hidden + SLACK_BYTES
