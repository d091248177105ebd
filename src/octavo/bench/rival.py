"""``octavo bench compare --rival llama.cpp --model MODEL``: both engines in this process on one file, in turns.

Rows: a prompt of 512 tokens (as tokens a second), and decoding of 1, 8 and many greedy streams from a context of 16. A
round runs every row on both engines, one directly after the other, and which one begins alternates; a ratio is that of
one round, so drift of the machine hits both. The table shows medians and the range of the ratios.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from octavo import host
from octavo.bench.llamacpp import LlamaContext, LlamaCpp
from octavo.bench.metrics import percentile
from octavo.config import EngineOptions
from octavo.engine.core import EngineCore
from octavo.errors import UsageError
from octavo.files.base import ModelFiles
from octavo.host.requantize import requantize
from octavo.protocol.generate import GenerateRequest, SamplingParams
from octavo.runner.cpu.threads import available_threads

CONTEXT = 16  # tokens before the first timed decode step
PAUSE_S = 0.05  # between engines: the other one's threads go to sleep
NAMES = ("Octavo", "llama.cpp")


class Contestant(Protocol):
    """An engine with a model loaded."""

    def prompt(self, tokens: list[int]) -> float:
        """Seconds until a new prompt has its first answer token."""

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """Seconds of ``steps`` steps in which every prompt's answer grows by one token."""


class Ours:
    """The engine's own loop: schedule, forward, sample, apply."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.next_id = 0

    def prompt(self, tokens: list[int]) -> float:
        """See ``Contestant``."""
        began = time.perf_counter()
        self._submit(tokens, 1)
        while self.core.has_work:
            self.core.step()
        return time.perf_counter() - began

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """See ``Contestant``."""
        ids = [self._submit(tokens, steps + 8) for tokens in prompts]
        started: set[int] = set()
        while len(started) < len(ids):
            started.update(delta.id for delta in self.core.step())
        self.core.step()
        began = time.perf_counter()
        for _ in range(steps):
            self.core.step()
        elapsed = time.perf_counter() - began
        self.core.abort(ids)
        while self.core.has_work:
            self.core.step()
        return elapsed

    def _submit(self, tokens: list[int], count: int) -> int:
        self.next_id += 1
        sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        self.core.submit(GenerateRequest(id=self.next_id, prompt_token_ids=tokens, sampling=sampling))
        return self.next_id


class Theirs:
    """``llama_decode`` with the best token taken from its logits; a context of exactly the needed size for each load."""

    def __init__(self, engine: LlamaCpp) -> None:
        self.engine = engine
        self.contexts: dict[tuple[int, int], LlamaContext] = {}

    def prompt(self, tokens: list[int]) -> float:
        """See ``Contestant``."""
        context = self._context(1, len(tokens) + 1)
        began = time.perf_counter()
        context.logits(context.prefill([tokens])).argmax()
        return time.perf_counter() - began

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """See ``Contestant``."""
        count, length = len(prompts), len(prompts[0])
        context = self._context(count, length + steps + 2)
        context.prefill(prompts)
        drawn, every, wanted = [prompt[-1] for prompt in prompts], list(range(count)), [True] * count
        began = time.perf_counter()
        for step in range(steps + 1):
            if step == 1:  # the first step warms up, as the other engine's does
                began = time.perf_counter()
            context.decode(drawn, [length + step] * count, every, wanted)
            drawn = [int(context.logits(i).argmax()) for i in every]
        return time.perf_counter() - began

    def _context(self, sequences: int, tokens: int) -> LlamaContext:
        key = sequences, tokens
        if key not in self.contexts:
            self.contexts[key] = self.engine.context(*key)
        self.contexts[key].clear()
        return self.contexts[key]

    def close(self) -> None:
        """Free contexts and model."""
        for context in self.contexts.values():
            context.close()
        self.engine.close()


@dataclass(frozen=True)
class Load:
    """One row's load: a prompt of ``tokens``, or ``streams`` that decode ``steps`` tokens."""

    name: str
    tokens: int = 0
    streams: int = 0
    steps: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that the timed part computes."""
        return self.tokens or self.streams * self.steps

    def run(self, contestant: Contestant, seed: int, vocab_size: int) -> float:
        """Tokens a second."""
        rng = np.random.default_rng(seed)
        shape = (max(1, self.streams), self.tokens or CONTEXT)
        prompts = rng.integers(vocab_size // 50, vocab_size, shape).tolist()
        if self.tokens:
            return self.num_tokens / contestant.prompt(prompts[0])
        return self.num_tokens / contestant.decode(prompts, self.steps)


@dataclass(frozen=True)
class RivalRow:
    """Medians of both engines in tokens a second; median, lowest and highest ratio of the rounds."""

    name: str
    ours: float
    theirs: float
    ratio: float
    lowest: float
    highest: float


def loads(args: argparse.Namespace) -> list[Load]:
    """The rows: prompt, 1 user, 8 users, peak."""
    rows = [Load(f"prompt of {args.input_len}", tokens=args.input_len)]
    for name, streams in (
        ("1 user", 1),
        ("8 users", 8),
        (f"peak ({args.peak_concurrency})", args.peak_concurrency),
    ):
        rows.append(
            Load(name, streams=streams, steps=args.output_len if streams <= 8 else args.output_len // 4)
        )
    return rows


def play(
    sides: tuple[Contestant, Contestant], rows: list[Load], rounds: int, vocab_size: int
) -> list[RivalRow]:
    """All rounds, in turns; one more before them warms up."""
    found: list[list[list[float]]] = [[[], []] for _ in rows]
    for number in range(-1, rounds):
        for place, load in enumerate(rows):
            if sys.stderr.isatty():
                print(
                    f"\rround {number + 1} of {rounds}: {load.name:<20}", end="", file=sys.stderr, flush=True
                )
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                time.sleep(PAUSE_S)
                rate = load.run(sides[which], 1000 * (number + 1) + place, vocab_size)
                if number >= 0:
                    found[place][which].append(rate)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    table = []
    for load, (ours, theirs) in zip(rows, found):
        ratios = [a / b for a, b in zip(ours, theirs)]
        medians = percentile(ours, 50), percentile(theirs, 50)
        table.append(RivalRow(load.name, *medians, percentile(ratios, 50), min(ratios), max(ratios)))
    return table


def render(table: list[RivalRow]) -> str:
    """The rows as text."""
    lines = [f"{'load':<16}{'Octavo tok/s':>14}{'llama.cpp tok/s':>17}{'ratio':>8}  range"]
    for row in table:
        span = f"{row.lowest:.2f}-{row.highest:.2f}"
        lines.append(f"{row.name:<16}{row.ours:>14.1f}{row.theirs:>17.1f}{row.ratio:>7.2f}x  {span}")
    return "\n".join(lines)


def open_ours(args: argparse.Namespace, model: str, threads: int) -> tuple[ModelFiles, EngineCore]:
    """The model on the compiled path, with room for the peak and no prefix cache."""
    options = EngineOptions.of(
        model=model,
        device="cpu",
        threads=threads,
        max_model_len=str(max(args.input_len, CONTEXT + args.output_len) + 32),
        max_num_seqs=max(8, args.peak_concurrency),
        enable_prefix_caching=False,
    )
    files = host.open_files(options)
    return files, host.build_core(options, files)


def main(args: argparse.Namespace) -> int:
    """Load both engines, play, print the table, write it with ``--output-json``."""
    if not args.model:
        raise UsageError("--rival llama.cpp needs a model file.", "Add --model smollm2:135m, for example.")
    threads = args.threads or available_threads()
    with ExitStack() as stack:
        model = args.model
        if args.requantize:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="octavo-bench-")))
            files = host.open_files(EngineOptions.of(model=model, device="cpu"))
            model = str(requantize(files, args.requantize, folder))
            files.close()
        files, core = open_ours(args, model, threads)
        stack.callback(core.close)
        theirs = Theirs(LlamaCpp(files.path, threads))
        stack.callback(theirs.close)
        print(f"{files.name}{f' as {args.requantize}' if args.requantize else ''}, {threads} threads each")
        print(f"Octavo: {core.info.kernels.get('target', 'torch')}; {theirs.engine.describe()}")
        table = play((Ours(core), theirs), loads(args), args.rounds, theirs.engine.vocab_size)
        print(render(table))
    if args.output_json:
        content = {"model": args.model, "requantize": args.requantize, "rows": [asdict(row) for row in table]}
        Path(args.output_json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0
