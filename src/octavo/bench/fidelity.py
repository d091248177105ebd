"""``octavo bench fidelity MODEL``: how near the compiled CPU path is to the model's dequantized weights in float32.

The torch path in float32 continues prompts of many kinds greedily; at every token both engines see the same text, and
their logits are compared: share of tokens both would take, KL(float32 || engine) in nats, and the difference of the
logits themselves: its mean (an offset, which no probability shows) and its spread. ``--rival llama.cpp`` puts that
engine through the same tokens.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from octavo import host
from octavo.api.text.tokenizer import load_tokenizer
from octavo.bench.feed import Feeder
from octavo.bench.llamacpp import LlamaContext, LlamaCpp
from octavo.bench.prompts import PROMPTS
from octavo.config import EngineOptions
from octavo.errors import UsageError
from octavo.protocol.generate import SamplingParams
from octavo.runner.cpu.runner import CPURunner
from octavo.runner.cpu.threads import available_threads
from octavo.runner.runner import TorchRunner

Floats = NDArray[np.float32]
# Asking for log probabilities keeps every logit: the likeliest alone would do for greedy tokens.
WHOLE = SamplingParams(temperature=0.0, max_tokens=4096, logprobs=0)


class Subject(Protocol):
    """An engine that is shown texts."""

    def logits(self, texts: list[list[int]], done: int) -> list[Floats]:
        """[V] behind each text, of which all tokens from ``done`` behind the prompt on are new (0: everything)."""


class Compiled:
    """The compiled CPU path."""

    def __init__(self, runner: CPURunner, rows: int, room: int) -> None:
        self.runner = runner
        self.feeder = Feeder(runner, rows, room, WHOLE)

    def logits(self, texts: list[list[int]], done: int) -> list[Floats]:
        """See ``Subject``."""
        starts = [len(text) - 1 if done else 0 for text in texts]
        counts = [len(text) - start for text, start in zip(texts, starts)]
        self.runner.forward(self.feeder.plan(starts, counts, texts))
        found = self.runner.logits[: len(texts), : self.runner.vocab_size].copy()
        self.runner.sample([])
        self.runner.collect()
        return list(found)


class Reference:
    """The torch path in float32."""

    def __init__(self, runner: TorchRunner, rows: int, room: int) -> None:
        self.runner = runner
        self.feeder = Feeder(runner, rows, room, SamplingParams(temperature=0.0, max_tokens=4096))

    def logits(self, texts: list[list[int]], done: int) -> list[Floats]:
        """See ``Subject``."""
        starts = [len(text) - 1 if done else 0 for text in texts]
        counts = [len(text) - start for text, start in zip(texts, starts)]
        self.runner.forward(self.feeder.plan(starts, counts, texts))
        if self.runner.current is None:
            raise RuntimeError("the runner keeps no hidden states")
        found = self.runner.network.logits(self.runner.current[2][: len(texts)]).float()
        self.runner.sample([])
        self.runner.collect()
        return list(found.detach().numpy())


class Rival:
    """llama.cpp."""

    def __init__(self, context: LlamaContext) -> None:
        self.context = context

    def logits(self, texts: list[list[int]], done: int) -> list[Floats]:
        """See ``Subject``."""
        if done:
            last, every = [text[-1] for text in texts], list(range(len(texts)))
            self.context.decode(last, [len(text) - 1 for text in texts], every, [True] * len(texts))
            return [self.context.logits(i).copy() for i in every]
        found = []
        for sequence, text in enumerate(texts):
            found.append(self.context.logits(self.context.prefill([text], sequence)).copy())
        return found


@dataclass
class Score:
    """What a subject collects, one entry a token."""

    equal: list[bool] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    offset: list[float] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)

    def add(self, want: Floats, got: Floats) -> None:
        """One token's logits."""
        first, second = log_softmax(want), log_softmax(got)
        self.equal.append(int(want.argmax()) == int(got.argmax()))
        self.kl.append(float((np.exp(first) * (first - second)).sum()))
        difference = got.astype(np.float64) - want
        self.offset.append(float(difference.mean()))
        self.spread.append(float(difference.std()))


@dataclass(frozen=True)
class Verdict:
    """Shares and means over all tokens."""

    name: str
    tokens: int
    agreement: float
    mean_kl: float
    p99_kl: float
    offset: float
    spread: float

    @classmethod
    def of(cls, name: str, score: Score) -> Verdict:
        """Summarize."""
        return cls(
            name,
            len(score.kl),
            float(np.mean(score.equal)),
            float(np.mean(score.kl)),
            float(np.percentile(score.kl, 99)),
            float(np.mean(score.offset)),
            float(np.mean(score.spread)),
        )


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """In float64."""
    x = logits.astype(np.float64) - float(logits.max())
    return np.asarray(x - np.log(np.exp(x).sum()))


def compare(
    reference: Subject, subjects: dict[str, Subject], prompts: list[list[int]], tokens: int, ends: list[int]
) -> list[Verdict]:
    """Continue every prompt by the reference's best token (never an end of sequence), all subjects beside it."""
    scores = {name: Score() for name in subjects}
    texts = [list(prompt) for prompt in prompts]
    for done in range(tokens):
        wanted = reference.logits(texts, done)
        for name, subject in subjects.items():
            for want, got in zip(wanted, subject.logits(texts, done)):
                scores[name].add(want, got)
        for text, want in zip(texts, wanted):
            choice = want.copy()
            choice[ends] = -np.inf
            text.append(int(choice.argmax()))
    return [Verdict.of(name, score) for name, score in scores.items()]


def render(verdicts: list[Verdict]) -> str:
    """The verdicts as text."""
    head = ("engine", "tokens", "same token", "mean KL", "p99 KL", "logit offset", "spread")
    lines = [f"{head[0]:<12}{head[1]:>8}{head[2]:>12}{head[3]:>10}{head[4]:>9}{head[5]:>14}{head[6]:>9}"]
    for row in verdicts:
        lines.append(
            f"{row.name:<12}{row.tokens:>8}{row.agreement:>12.1%}{row.mean_kl:>10.5f}{row.p99_kl:>9.4f}"
            f"{row.offset:>14.5f}{row.spread:>9.4f}"
        )
    return "\n".join(lines)


def main(args: argparse.Namespace, options: EngineOptions) -> int:
    """Load the model on both paths (and in llama.cpp), compare, print."""
    files = host.open_files(options)
    tokenizer = load_tokenizer(files)
    prompts = [tokenizer.encode(text) for text in PROMPTS[: args.num_prompts]]
    rows, room = len(prompts), max(map(len, prompts)) + args.num_tokens + 1
    shared = {
        "device": "cpu",
        "max_num_seqs": rows,
        "max_model_len": str(room + 16),
        "threads": options.device.threads,
    }
    named = {"model": options.model.model, "quantization": options.model.quantization}
    with ExitStack() as stack:
        ours = host.build_runner(EngineOptions.of(**shared, **named), files).runner
        stack.callback(ours.close)
        exact = {"cpu_backend": "torch", "dtype": "float32", "model": options.model.model}
        reference = host.build_runner(EngineOptions.of(**shared, **exact), files).runner
        stack.callback(reference.close)
        if not isinstance(ours, CPURunner) or not isinstance(reference, TorchRunner):
            raise UsageError(f"{files.name} has no compiled path here.", "octavo doctor MODEL says why.")
        subjects: dict[str, Subject] = {"Octavo": Compiled(ours, rows, room)}
        if args.rival is not None:
            if args.rival != "llama.cpp":
                raise UsageError(f"Unknown rival {args.rival}.", "Use --rival llama.cpp.")
            engine = LlamaCpp(files.path, options.device.threads or available_threads())
            stack.callback(engine.close)
            context = engine.context(rows, room)
            stack.callback(context.close)
            subjects["llama.cpp"] = Rival(context)
        verdicts = compare(
            Reference(reference, rows, room),
            subjects,
            prompts,
            args.num_tokens,
            list(tokenizer.eos_token_ids),
        )
    print(f"{files.name} against its dequantized weights in float32, {rows} prompts:")
    print(render(verdicts))
    if args.output_json:
        Path(args.output_json).write_text(json.dumps([asdict(row) for row in verdicts], indent=2) + "\n")
    return 0
