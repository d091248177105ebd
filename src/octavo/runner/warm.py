"""Runs a step of every shape class once, so that nothing compiles after the server says it is ready (rule R7).

Classes: one row and several (their kernels differ), short and long chunks, a long chunk beside decodes (whose kernel
follows their number, by powers of two), and every stage of sampling. The steps go through the real runner; they scribble
on page 0, which belongs to nobody yet.
"""

from __future__ import annotations

from octavo.protocol.generate import SamplingParams
from octavo.protocol.plan import GrammarMask, SlotInit, StepPlan
from octavo.runner.runner import TorchRunner

LONG = 1024  # tokens from which attention takes its large tiles
MOST_ROWS = 512  # from about a quarter of these on no row of a decode is split any more, whatever the model
SAMPLINGS = (
    SamplingParams(temperature=0.0),
    SamplingParams(
        temperature=0.0, logit_bias={0: 1.0}
    ),  # changed logits are float32, others of the run type
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=1.0, top_p=0.9, top_k=20, min_p=0.05),
    SamplingParams(
        temperature=1.0, repetition_penalty=1.1, logprobs=2, prompt_logprobs=2, logit_bias={0: 1.0}
    ),
)
UNRECORDED = SamplingParams(temperature=0.0, prompt_logprobs=1)


def warm(runner: TorchRunner, max_model_len: int) -> int:
    """Run the steps; returns how many. They need one slot more than one where the runner has it."""
    long = min(LONG + 128, runner.max_tokens - 1, max_model_len - 1)
    rows = [[1], [5], [20], [50], [long]]
    if runner.num_slots > 1:
        rows += [[1, 1], [5, 1], [long, 1], [5] * min(80, runner.num_slots, runner.max_tokens // 5)]
    count = 0
    for shape in rows:
        for sampling in SAMPLINGS:
            count += _run(runner, shape, sampling)
    for size in row_counts(min(runner.num_slots, MOST_ROWS, runner.max_tokens - long + 1)):
        # One prompt's log-probabilities keep a step from being a replay of a recorded one, which has a row count of its own.
        count += _run(runner, [long] + [1] * (size - 1), UNRECORDED, SAMPLINGS[0])
    return count


def row_counts(most: int) -> list[int]:
    """Powers of two below ``most``, from 4 on, and ``most``: the kernel of single-token rows splits them by these."""
    return [1 << power for power in range(2, most.bit_length()) if 1 << power < most] + [most] * (most > 2)


def _run(
    runner: TorchRunner, shape: list[int], first: SamplingParams, others: SamplingParams | None = None
) -> int:
    """A prompt step of these lengths, then one decode of all rows; ``others``: for all but the first row."""
    every = list(range(len(shape)))
    words = b"\xff" * (4 * -(-runner.sampler.vocab_size // 32))
    sampling = [first, *[others or first] * (len(shape) - 1)]
    admits = [SlotInit(i, [0] * size, size, sampling[i], i, [0]) for i, size in enumerate(shape)]
    none, yes = [0] * len(shape), [True] * len(shape)
    prompt = StepPlan(0, every, none, shape, none, yes, admits, [], [])
    decode = StepPlan(1, every, shape, [1] * len(shape), none, yes, [], [], [])
    for plan in (prompt, decode):
        runner.forward(plan)
        runner.sample([GrammarMask(0, words)] if first.logit_bias else [])
        runner.collect()
    return 2
