"""What a load test sends and when: prompts, answer lengths, arrival times. Deterministic in the seed."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.errors import UsageError

# Ids that every vocabulary in use has, and that are above the special tokens most models put first.
FIRST_TOKEN_ID = 1000
NUM_TOKEN_IDS = 20000
CHARS_PER_TOKEN = 4
WORDS = (
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "government",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
)


@dataclass(frozen=True)
class Sample:
    """One request: token ids (or text) and how many tokens to ask for. ``prompt_len`` is in tokens."""

    prompt: list[int] | str
    prompt_len: int
    output_len: int


@dataclass(frozen=True)
class TokenIds:
    """The range random prompts are drawn from: ``first`` up to ``first + count``, exclusive."""

    first: int = FIRST_TOKEN_ID
    count: int = NUM_TOKEN_IDS

    def draw(self, generator: random.Random, index: int, length: int) -> list[int]:
        """``length`` random ids; the first two spell ``index``, so that no two prompts share a page."""
        ids = generator.choices(range(self.first, self.first + self.count), k=length)
        for position in range(min(2, length)):
            ids[position] = self.first + index // self.count**position % self.count
        return ids


def random_samples(
    num_prompts: int,
    input_len: int,
    output_len: int,
    *,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
    ids: TokenIds | None = None,
    seed: int = 0,
) -> list[Sample]:
    """Random token ids, all prompts distinct; lengths uniform in ``len * (1 - ratio) .. len * (1 + ratio)``.

    ``prefix_len`` more tokens, the same in every prompt, go before them.
    """
    if not 0.0 <= range_ratio < 1.0:
        raise UsageError(f"--random-range-ratio must be at least 0 and below 1, got {range_ratio}.")
    ids = ids or TokenIds()
    generator = random.Random(seed)
    prefix = generator.choices(range(ids.first, ids.first + ids.count), k=prefix_len)

    def length(mean: int) -> int:
        return max(1, generator.randint(round(mean * (1 - range_ratio)), round(mean * (1 + range_ratio))))

    samples = []
    for index in range(num_prompts):
        prompt = prefix + ids.draw(generator, index, length(input_len))
        samples.append(Sample(prompt, len(prompt), length(output_len)))
    return samples


def prefix_repetition_samples(
    num_prompts: int,
    *,
    num_prefixes: int,
    prefix_len: int,
    suffix_len: int,
    output_len: int,
    ids: TokenIds | None = None,
    seed: int = 0,
) -> list[Sample]:
    """``num_prefixes`` shared prefixes in turn, each followed by a suffix of its own, in shuffled order."""
    if num_prefixes < 1 or num_prompts < num_prefixes:
        raise UsageError(f"{num_prompts} prompts cannot use {num_prefixes} prefixes.")
    ids = ids or TokenIds()
    generator = random.Random(seed)
    prefixes = [ids.draw(generator, index, prefix_len) for index in range(num_prefixes)]
    samples = []
    for index in range(num_prompts):
        prompt = prefixes[index % num_prefixes] + ids.draw(generator, num_prefixes + index, suffix_len)
        samples.append(Sample(prompt, len(prompt), output_len))
    generator.shuffle(samples)
    return samples


def as_text(samples: list[Sample], seed: int = 0) -> list[Sample]:
    """The same lengths as words, about a token each, for endpoints that take no token ids (chat)."""
    generator = random.Random(seed)
    result = []
    for index, sample in enumerate(samples):
        if isinstance(sample.prompt, str):
            result.append(sample)
            continue
        words = generator.choices(WORDS, k=max(1, sample.prompt_len - 1))
        result.append(Sample(f"{index} " + " ".join(words), sample.prompt_len, sample.output_len))
    return result


def custom_samples(path: Path, num_prompts: int, output_len: int, seed: int = 0) -> list[Sample]:
    """Lines of ``{"prompt": text, "output_tokens": number}`` (the number is optional), in file order."""
    samples = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        entry = _json(line, f"{path}:{number}")
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise UsageError(f'{path}:{number} has no text field "prompt".')
        asked = entry.get("output_tokens", output_len)
        if not isinstance(asked, int) or asked < 1:
            raise UsageError(f'{path}:{number}: "output_tokens" must be a number above 0, got {asked!r}.')
        samples.append(Sample(entry["prompt"], _tokens(entry["prompt"]), asked))
    return _repeat(samples, num_prompts, path)


def sharegpt_samples(path: Path, num_prompts: int, output_len: int | None, seed: int = 0) -> list[Sample]:
    """First turn and length of the first answer of each conversation of a ShareGPT JSON file, shuffled.

    Lengths in tokens are estimated from characters; the server's own counts go into the result.
    """
    entries = _json(_read(path), str(path))
    if not isinstance(entries, list):
        raise UsageError(f"{path} is not a list of conversations.")
    samples = []
    for entry in entries:
        turns = entry.get("conversations", []) if isinstance(entry, dict) else []
        texts = [turn.get("value") for turn in turns[:2] if isinstance(turn, dict)]
        if len(texts) < 2:
            continue
        prompt, reply = texts
        if isinstance(prompt, str) and isinstance(reply, str) and prompt and reply:
            samples.append(Sample(prompt, _tokens(prompt), output_len or _tokens(reply)))
    random.Random(seed).shuffle(samples)
    return _repeat(samples, num_prompts, path)


def arrival_times(num_requests: int, rate: float, burstiness: float, seed: int = 0) -> list[float]:
    """Seconds from the start at which requests are sent: gamma intervals of mean ``1 / rate``.

    ``burstiness`` 1 is a Poisson process, less is burstier, more is more even. An infinite rate is all at once.
    The times are scaled so that the last lies at ``num_requests / rate``: two runs offer the same load.
    """
    if burstiness <= 0:
        raise UsageError(f"--burstiness must be above 0, got {burstiness}.")
    if not rate > 0:
        raise UsageError(f"--request-rate must be above 0 (or inf), got {rate}.")
    if rate == float("inf"):
        return [0.0] * num_requests
    generator = random.Random(seed)
    times, now = [], 0.0
    for _ in range(num_requests):
        now += generator.gammavariate(burstiness, 1.0 / (rate * burstiness))
        times.append(now)
    scale = num_requests / rate / now if now > 0 else 1.0
    return [time * scale for time in times]


def _tokens(text: str) -> int:
    return max(1, len(text) // CHARS_PER_TOKEN)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"Cannot read the dataset {path}: {error}.", "Give a file with --dataset-path."
        ) from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is not JSON: {error}.") from None


def _repeat(samples: list[Sample], num_prompts: int, path: Path) -> list[Sample]:
    if not samples:
        raise UsageError(f"{path} holds no usable prompt.")
    return [samples[index % len(samples)] for index in range(num_prompts)]
