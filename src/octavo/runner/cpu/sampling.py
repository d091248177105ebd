"""Draws one token per sampling row from float32 logits in host memory, in vLLM's order.

    raw logits - log probabilities (if asked) - grammar mask - logit bias, min_tokens - penalties - filters - draw

Every stage touches only the rows that ask for it. The random draws of a step are one run of a compiled kernel (``draw``),
whose noise depends on (seed, position, token id) alone: a request draws the same tokens in any batch and after preemption.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from octavo.device.kernels.numba import shared
from octavo.device.kernels.numba.library import KernelLibrary
from octavo.protocol.generate import Logprob, SamplingParams
from octavo.protocol.plan import GrammarMask, SlotInit
from octavo.runner.cpu.program import Program, float_bits
from octavo.runner.cpu.slots import Slots
from octavo.runner.cpu.threads import Team

Floats = NDArray[np.float32]

MOST_LIKELIEST = 128  # more of them leave little to save


@dataclass(frozen=True)
class Row:
    """One token to draw: row ``index`` of the logits, for ``position`` of ``slot``; ``best`` is its likeliest token."""

    index: int
    slot: int
    position: int
    mask: GrammarMask | None
    best: int


class Sampler:
    """Keeps the token counts of sequences with penalties; everything else is in ``Slots``.

    ``logits`` [rows, padded vocabulary] float32 is where the head writes.
    """

    def __init__(
        self, slots: Slots, logits: Floats, vocab_size: int, team: Team, library: KernelLibrary
    ) -> None:
        self.slots = slots
        self.logits = logits
        self.vocab_size = vocab_size
        self.team = team
        self.generated: dict[int, NDArray[np.int32]] = {}
        self.prompted: dict[int, NDArray[np.bool_]] = {}
        rows, width = logits.shape
        segments = -(-width // shared.DRAW_SEGMENT)
        self.table = np.zeros((rows, shared.ROW_FIELDS), np.int64)
        self.scores = np.zeros((rows, segments), np.float32)
        self.ids = np.zeros((rows, segments), np.int64)
        program = Program(library)
        arrays = [x.ctypes.data for x in (self.table, self.scores, self.ids)]
        self.arguments = program.add("draw", [0, arrays[0], width, arrays[1], arrays[2], segments])
        self.tape = program.tape()

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

    def num_likeliest(self, slot: int) -> int:
        """How many of the likeliest tokens decide the slot's next draw; 0 = all of them do, or may."""
        sampling = self.slots.sampling[slot]
        if (
            sampling.logprobs is not None
            or sampling.logit_bias
            or sampling.min_tokens
            or slot in self.generated
        ):
            return 0
        return 1 if sampling.greedy else sampling.top_k if 0 < sampling.top_k <= MOST_LIKELIEST else 0

    def draw(self, rows: list[Row]) -> list[int]:
        """One token a row; the rows' logits may be overwritten."""
        tokens = [0] * len(rows)
        random: list[int] = []
        for place, row in enumerate(rows):
            logits, sampling = self.logits[row.index, : self.vocab_size], self.slots.sampling[row.slot]
            changed = self._change(logits, row, sampling)
            if sampling.greedy:
                tokens[place] = int(logits.argmax()) if changed else row.best
            else:
                self._prepare(len(random), row, logits, sampling)
                random.append(place)
        if random:
            self.arguments[0] = len(random)
            self.team.run(self.tape)
            best = self.scores[: len(random)].argmax(axis=1)
            for index, place in enumerate(random):
                tokens[place] = int(self.ids[index, best[index]])
        for row, token in zip(rows, tokens):
            counts = self.generated.get(row.slot)
            if counts is not None:
                counts[token] += 1
        return tokens

    def _prepare(self, index: int, row: Row, logits: Floats, sampling: SamplingParams) -> None:
        """Row ``index`` of the kernel's table."""
        self.logits[row.index, self.vocab_size :] = -np.inf
        least = threshold(logits, sampling)
        first, second = noise_words(int(self.slots.seeds[row.slot]), row.position)
        temperature = float_bits(sampling.temperature)
        self.table[index] = logits.ctypes.data, temperature, float_bits(least), first, second

    def _change(self, logits: Floats, row: Row, sampling: SamplingParams) -> bool:
        """Masks, bias, min_tokens and penalties, in place; False where there are none."""
        changed = False
        if row.mask is not None and row.mask.penalties:
            changed = True
            taken = row.mask.penalties[0]
            logits[np.array(list(taken), np.int64)] -= np.array(list(taken.values()), np.float32)
        if row.mask is not None and row.mask.words:
            changed = True
            bits = np.unpackbits(np.frombuffer(row.mask.words, np.uint8), bitorder="little")[: len(logits)]
            logits[: len(bits)][bits == 0] = -np.inf
        if sampling.logit_bias:
            changed = True
            ids = np.array(list(sampling.logit_bias), np.int64)
            logits[ids] += np.array(list(sampling.logit_bias.values()), np.float32)
        if row.position - self.slots.num_prompt[row.slot] < sampling.min_tokens:
            changed = True
            stops = [token for token in self.slots.stop_token_ids[row.slot] if token < self.vocab_size]
            logits[stops] = -np.inf
        counts = self.generated.get(row.slot)
        if counts is not None:
            changed = True
            seen = np.flatnonzero(self.prompted[row.slot] | (counts > 0))
            values, repetition = logits[seen], np.float32(sampling.repetition_penalty)
            values = np.where(values > 0, values / repetition, values * repetition)
            times = counts[seen].astype(np.float32)
            values -= np.float32(sampling.frequency_penalty) * times
            values -= np.float32(sampling.presence_penalty) * (times > 0)
            logits[seen] = values
        return changed


def threshold(logits: Floats, sampling: SamplingParams) -> float:
    """Least logit / temperature that min_p, top_k and top_p all keep; -inf where nothing is filtered.

    A filter keeps what is at least as likely as its threshold, so equals stay together. Only the likeliest tokens are
    sorted: everything within some distance of the best, which grows until it surely holds the threshold.
    """
    top_k = sampling.top_k if 0 < sampling.top_k < len(logits) else 0
    if not top_k and sampling.top_p >= 1 and sampling.min_p <= 0:
        return -np.inf
    scaled = logits / np.float32(sampling.temperature)
    best = float(scaled.max())
    least = best + float(np.log(np.float32(sampling.min_p))) if sampling.min_p > 0 else -np.inf
    if not top_k and sampling.top_p >= 1:
        return least
    weights = np.exp(scaled - np.float32(best))
    reach = 6.0
    while True:
        inside = scaled >= best - reach
        whole = reach > 1000 or bool(inside.all())
        near = np.sort(scaled[inside])[::-1]
        if whole or (len(near) >= top_k and (top_k or sampling.top_p >= 1)):
            break
        if not top_k and float(weights[inside].sum(dtype=np.float64)) >= sampling.top_p * _mass(
            weights, scaled, least
        ):
            break
        reach *= 2
    if top_k:
        least = max(least, float(near[min(top_k, len(near)) - 1]))
        near = near[near >= least]
    if sampling.top_p < 1:
        mass = np.exp(near - np.float32(best)).cumsum(dtype=np.float64)
        total = float(mass[-1]) if top_k else _mass(weights, scaled, least)
        enough = int(np.searchsorted(mass, sampling.top_p * total, side="left"))
        least = max(least, float(near[min(enough, len(near) - 1)]))
    return least


def _mass(weights: Floats, scaled: Floats, least: float) -> float:
    """Sum of the weights that a lower bound keeps."""
    kept = weights if least == -np.inf else weights[scaled >= least]
    return float(kept.sum(dtype=np.float64))


def noise_words(seed: int, position: int) -> tuple[int, int]:
    """The two 32-bit words that seed and position contribute to the noise of every token."""
    first = _mix(_mix(seed) ^ (position & 0xFFFFFFFF))
    second = _mix(_mix((seed >> 32) ^ shared.WEYL) ^ (position >> 32 & 0xFFFFFFFF) ^ first)
    return first, second


def _mix(x: int) -> int:
    """A bijection of 32-bit words that flips each output bit about half the time."""
    x &= 0xFFFFFFFF
    x = (x ^ (x >> 16)) * shared.MIX_A & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * shared.MIX_B & 0xFFFFFFFF
    return x ^ (x >> 16)


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
        top = np.argpartition(raw, len(raw) - limit)[len(raw) - limit :]
        top = top[np.lexsort((top, -raw[top]))]
        found += [Logprob(int(t), float(raw[t]) - total, i + 1) for i, t in enumerate(top)]
    return found
