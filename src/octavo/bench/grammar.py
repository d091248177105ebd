"""What grammars cost: the same load with free answers and with constrained ones, on a model of random weights.

    python -m octavo.bench.grammar --model llama-3.1-8b --concurrency 64

Masks are computed on the host while the device computes the step that they are for. Random weights draw random tokens among
those allowed, so every row is somewhere else in its grammar. The vocabulary is made up: bytes, then words with and
without a space in front.
"""

from __future__ import annotations

import argparse
import random
import string
import sys
import time
from collections.abc import Iterator

import numpy as np

from octavo import host
from octavo.config import EngineOptions
from octavo.engine.core import EngineCore
from octavo.engine.structured.compiler import GrammarCompiler
from octavo.engine.structured.lobby import Lobby
from octavo.engine.structured.vocabulary import Vocabulary
from octavo.protocol.generate import GenerateRequest, SamplingParams

SCHEMA = (
    '{"type":"object","properties":{"name":{"type":"string","minLength":40,"maxLength":90},"age":{"type":"integer"},'
    '"tags":{"type":"array","minItems":80,"items":{"type":"string","maxLength":30}}},'
    '"required":["name","age","tags"],"additionalProperties":false}'
)
GRAMMARS = {
    "free": None,
    "schema": f"start: %json {SCHEMA}",
    "regex": "start: /(-?[0-9]{1,6}[.][0-9]{2},? ?){200}/",
}
EOS = 0


def make_vocabulary(size: int) -> Vocabulary:
    """``size`` tokens: an end, every byte, then distinct words."""
    rng = random.Random(0)
    tokens = [b"<end>"] + [bytes([i]) for i in range(256)]
    seen = set(tokens)
    while len(tokens) < size:
        kind = string.digits if rng.random() < 0.01 else string.ascii_lowercase
        word = "".join(rng.choice(kind) for _ in range(rng.randint(2, 9)))
        token = (" " * rng.randint(0, 1) + word.title() if rng.random() < 0.3 else word).encode()
        if token not in seen:
            seen.add(token)
            tokens.append(token)
    return Vocabulary(
        tokens[:size], frozenset({EOS}), (EOS,), lambda text: [1 + byte for byte in text.encode()]
    )


def requests(count: int, grammar: str | None, output_len: int, first: int) -> Iterator[GenerateRequest]:
    """Prompts of their own; every answer has its full length."""
    rng = random.Random(first)
    for number in range(count):
        yield GenerateRequest(
            id=first + number,
            prompt_token_ids=[rng.randrange(1, 2_000) for _ in range(64)],
            sampling=SamplingParams(temperature=1.0, seed=number, max_tokens=output_len, ignore_eos=True),
            grammar=grammar,
        )


def run(core: EngineCore, wanted: Iterator[GenerateRequest]) -> tuple[float, list[float], list[str]]:
    """(tokens a second, milliseconds of masks of each step, reasons of answers that ended early)."""
    for request in wanted:
        core.submit(request)
    tokens = 0
    early: list[str] = []
    masks_ms: list[float] = []
    inner = core.executor.sample
    last = began = time.perf_counter()

    def sample(masks: list[object]) -> None:
        masks_ms.append((time.perf_counter() - last) * 1e3)
        inner(masks)  # type: ignore[arg-type]

    collect = core.executor.collect

    def collected() -> object:
        nonlocal last
        result = collect()
        last = time.perf_counter()
        return result

    core.executor.sample, core.executor.collect = sample, collected  # type: ignore[assignment, method-assign]
    try:
        while core.has_work:
            for delta in core.step():
                tokens += len(delta.tokens)
                if delta.finish_reason not in (None, "length"):
                    early.append(f"{delta.finish_reason} {delta.error or ''}")
    finally:
        core.executor.sample, core.executor.collect = inner, collect  # type: ignore[method-assign]
    return tokens / (time.perf_counter() - began), masks_ms, early


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="grammar", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default="llama-3.1-8b", help="built-in shape or folder, random weights")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    options = EngineOptions.of(
        model=arguments.model, load_format="dummy", max_model_len="2048", device=arguments.device
    )
    core = host.build_core(options, host.open_files(options))
    size = core.info.vocab_size
    vocabulary = make_vocabulary(size)
    core.lobby = Lobby(GrammarCompiler(lambda: vocabulary, size))
    first, best = 1, dict.fromkeys(GRAMMARS, 0.0)
    for turn in range(arguments.rounds + 1):  # the first one warms up
        for name, grammar in GRAMMARS.items():
            load = requests(arguments.concurrency, grammar, arguments.output_len, first)
            first += arguments.concurrency
            rate, masks_ms, early = run(core, load)
            best[name] = max(best[name], rate if turn else 0.0)
            print(
                f"{'warm-up' if not turn else turn:>7} {name:7} {rate:9.0f} tok/s, after the draw {np.mean(masks_ms):.2f} ms a step"
                + f" (p50 {np.percentile(masks_ms, 50):.2f}, p90 {np.percentile(masks_ms, 90):.2f},"
                + f" most {max(masks_ms):.2f})"
                + (f", {len(early)} ended early: {early[0]}" if early else ""),
                flush=True,
            )
    for name, rate in best.items():
        print(f"{name:7} {rate:9.0f} tok/s, {rate / best['free'] - 1:+.1%}")
    core.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
