"""Draws one token per sampling row from float32 logits in host memory, in vLLM's order.

    raw logits - log probabilities (if asked) - grammar mask - logit bias, min_tokens - penalties - filters - draw

The draw is the Gumbel-max trick with noise that is a hash of (seed, position, token id), the same function as in
``device.ops.sampling``: a request draws the same tokens alone, in any batch and after preemption.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.protocol.generate import Logprob, SamplingParams
from octavo.protocol.plan import GrammarMask, SlotInit
from octavo.runner.cpu.slots import Slots

Floats = NDArray[np.float32]
Words = NDArray[np.uint32]
WEYL = np.uint32(0x9E3779B9)
MIX_A, MIX_B = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)


class Sampler:
    """Keeps the token counts of sequences with penalties; everything else is in ``Slots``."""

    def __init__(self, slots: Slots, vocab_size: int) -> None:
        self.slots = slots
        self.vocab_size = vocab_size
        self.spread = np.arange(vocab_size, dtype=np.uint32) * WEYL
        self.generated: dict[int, NDArray[np.int32]] = {}
        self.prompted: dict[int, NDArray[np.bool_]] = {}

    def admit(self, admits: list[SlotInit]) -> None:
        """Count the tokens of new sequences that have penalties."""
        for admit in admits:
            self.generated.pop(admit.slot, None)
            self.prompted.pop(admit.slot, None)
            if not _penalized(admit.sampling):
                continue
            tokens = np.array(admit.token_ids, np.int64)
            prompted = np.zeros(self.vocab_size, np.bool_)
            prompted[tokens[: admit.num_prompt]] = True
            self.prompted[admit.slot] = prompted
            self.generated[admit.slot] = np.bincount(
                tokens[admit.num_prompt :], minlength=self.vocab_size
            ).astype(np.int32)

    def draw(self, logits: Floats, slot: int, position: int, mask: GrammarMask | None) -> int:
        """The token for ``position`` of ``slot``; logits [V] may be overwritten."""
        sampling = self.slots.sampling[slot]
        if mask is not None:
            self._mask(logits, mask)
        if sampling.logit_bias:
            ids = np.array(list(sampling.logit_bias), np.int64)
            logits[ids] += np.array(list(sampling.logit_bias.values()), np.float32)
        if position - self.slots.num_prompt[slot] < sampling.min_tokens:
            logits[self.slots.stop_token_ids[slot]] = -np.inf
        counts = self.generated.get(slot)
        if counts is not None:
            self._penalize(logits, slot, counts, sampling)
        if sampling.greedy:
            token = int(logits.argmax())
        else:
            token = self._random(logits, sampling, int(self.slots.seeds[slot]), position)
        if counts is not None:
            counts[token] += 1
        return token

    def _mask(self, logits: Floats, mask: GrammarMask) -> None:
        """Forbid what the grammar forbids: one bit a token, little-endian."""
        bits = np.unpackbits(np.frombuffer(mask.words, np.uint8), bitorder="little")[: len(logits)]
        logits[: len(bits)][bits == 0] = -np.inf

    def _penalize(
        self, logits: Floats, slot: int, counts: NDArray[np.int32], sampling: SamplingParams
    ) -> None:
        seen = np.flatnonzero(self.prompted[slot] | (counts > 0))
        values, repetition = logits[seen], np.float32(sampling.repetition_penalty)
        values = np.where(values > 0, values / repetition, values * repetition)
        times = counts[seen].astype(np.float32)
        values -= np.float32(sampling.frequency_penalty) * times
        values -= np.float32(sampling.presence_penalty) * (times > 0)
        logits[seen] = values

    def _random(self, logits: Floats, sampling: SamplingParams, seed: int, position: int) -> int:
        """argmax(logit / temperature + Gumbel noise) over the tokens that pass the filters."""
        scaled = logits / np.float32(sampling.temperature)
        least = threshold(scaled, sampling)
        allowed = np.flatnonzero(scaled >= least)
        noise = gumbel(seed, position, self.spread[: len(logits)][allowed])
        return int(allowed[(scaled[allowed] + noise).argmax()])


def threshold(scaled: Floats, sampling: SamplingParams) -> float:
    """Least scaled logit that min_p, top_k and top_p all keep; -inf where nothing is filtered."""
    best, least = float(scaled.max()), -np.inf
    if sampling.min_p > 0:
        least = best + float(np.log(sampling.min_p))
    top_k = sampling.top_k if 0 < sampling.top_k < len(scaled) else 0
    if top_k:
        least = max(least, float(np.partition(scaled, -top_k)[-top_k]))
    if sampling.top_p < 1:
        kept = scaled[scaled >= least]
        kept = np.sort(kept)[::-1]
        mass = np.exp(kept - np.float32(best)).cumsum(dtype=np.float64)
        enough = int(np.searchsorted(mass, sampling.top_p * mass[-1], side="left"))
        least = max(least, float(kept[min(enough, len(kept) - 1)]))
    return least


def gumbel(seed: int, position: int, spread: Words) -> Floats:
    """Gumbel noise for tokens; ``spread`` is token id x WEYL (mod 2^32)."""
    first = _mix(_mix(_word(seed)) ^ _word(position))
    second = _mix(_mix(_word(seed >> 32) ^ WEYL) ^ _word(position >> 32) ^ first)
    bits = _mix(_mix(spread ^ first) + second)
    uniform = (bits.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    # -log(1 - u), by its series where 1 - u would round: the winner of the draw has a small u.
    series = uniform * (1 + uniform * (np.float32(0.5) + uniform * np.float32(0.33333334)))
    tail = -np.log(np.maximum(1 - uniform, np.float32(3e-8)))
    noise: Floats = -np.log(np.where(uniform < np.float32(0.004), series, tail))
    return noise


def _word(value: int) -> Words:
    return np.array([value & 0xFFFFFFFF], np.uint32)


def _mix(x: Words) -> Words:
    """A bijection of 32-bit words that flips each output bit about half the time."""
    x = (x ^ (x >> np.uint32(16))) * MIX_A
    x = (x ^ (x >> np.uint32(15))) * MIX_B
    return x ^ (x >> np.uint32(16))


def _penalized(sampling: SamplingParams) -> bool:
    return bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0)


def logprobs(raw: Floats, token: int, limit: int) -> list[Logprob]:
    """The drawn token's log probability and rank under raw logits [V], then the ``limit`` best tokens'."""
    best = float(raw.max())
    total = best + float(np.log(np.exp(raw - np.float32(best)).sum(dtype=np.float64)))
    rank = int((raw > raw[token]).sum()) + 1
    found = [Logprob(token, float(raw[token]) - total, rank)]
    if limit:
        limit = min(limit, len(raw))
        top: NDArray[Any] = np.argpartition(raw, len(raw) - limit)[len(raw) - limit :]
        top = top[np.lexsort((top, -raw[top]))]
        found += [Logprob(int(t), float(raw[t]) - total, i + 1) for i, t in enumerate(top)]
    return found
