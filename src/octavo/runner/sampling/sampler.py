"""Draws one token per sampling row: masks, penalties, temperature and filters, in vLLM's order.

    raw logits ─ log probabilities (if asked) ─ grammar masks ─ logit bias, min_tokens ─ penalties ─ draw

Every stage touches only the rows that ask for it; a step of plain greedy rows is one argmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octavo.device.ops import sampling as ops
from octavo.device.ops.bind import Binder
from octavo.device.platform.base import Platform
from octavo.protocol.generate import Logprob, SamplingParams
from octavo.protocol.plan import GrammarMask, SlotInit
from octavo.runner.batch import Prepared
from octavo.runner.sampling.penalties import TokenCounts
from octavo.runner.slots import BIAS, LOGPROBS, MIN_TOKENS, PENALTY, RANDOM, Slots

MASKED_ROWS = 64  # masks are applied to so many rows at a time (bounds the peak of the reference body)
CHANGES = BIAS | MIN_TOKENS | PENALTY


@dataclass
class PendingLogprobs:
    """Log probabilities on their way to the host: per row the drawn token first, then the ``width`` best."""

    rows: list[int]  # index among the sampling rows
    counts: list[int]  # how many best tokens each row wants
    chosen: Tensor  # [n, 3] float64: token, log probability, rank
    top_ids: Tensor  # [n, width]
    top_values: Tensor  # [n, width]

    def per_row(self) -> dict[int, list[Logprob]]:
        """Row to its candidates; call after the copies are done."""
        found: dict[int, list[Logprob]] = {}
        chosen, ids, values = self.chosen.tolist(), self.top_ids.tolist(), self.top_values.tolist()
        for i, row in enumerate(self.rows):
            token, value, rank = chosen[i]
            first = Logprob(int(token), value, int(rank))
            best = [Logprob(ids[i][j], values[i][j], j + 1) for j in range(self.counts[i])]
            found[row] = [first, *best]
        return found


class Sampler:
    """Bound once for a device; holds the counts that penalties need."""

    def __init__(self, slots: Slots, vocab_size: int, platform: Platform, binder: Binder) -> None:
        self.slots = slots
        self.platform = platform
        self.vocab_size = vocab_size
        self.counts = TokenCounts(slots.num_slots, vocab_size, platform)
        spec = platform.op_spec(torch.float32)
        self.greedy = binder.bind(ops.GREEDY, spec)
        self.nan_rows = binder.bind(ops.NAN_ROWS, spec)
        self.mask_logits = binder.bind(ops.MASK_LOGITS, spec)
        self.sample = binder.bind(ops.SAMPLE, spec)
        self.penalize = binder.bind(ops.PENALIZE, spec)
        self.count_tokens = binder.bind(ops.COUNT_TOKENS, spec)
        self.logprobs_of = binder.bind(ops.LOGPROBS_OF, spec)

    def admit(self, admits: list[SlotInit]) -> None:
        """Prepare per-slot state of new sequences."""
        self.counts.admit(admits)

    def draw(
        self, logits: Tensor, step: Prepared, masks: list[GrammarMask]
    ) -> tuple[Tensor, Tensor, PendingLogprobs | None]:
        """Tokens [S] int64 for logits [S, V] in the run type (the caller keeps none), which rows hold a NaN, and log
        probabilities. Where a row asks for changes, they are made in float32."""
        wants = self.slots.wants[step.slots_host]
        any_wants = int(np.bitwise_or.reduce(wants)) if len(wants) else 0
        # Changes would hide what is wrong; without them an argmax tells by the way.
        before = self.nan_rows(logits) if masks or any_wants & CHANGES else None
        raw: Tensor | None = None
        if any_wants & LOGPROBS:
            asking = np.flatnonzero(wants & LOGPROBS)
            raw = logits[self._index(asking)].float()
        if masks or any_wants & CHANGES:
            logits = logits.float()
        if masks:
            self._apply_masks(logits, step, masks)
        if any_wants & (BIAS | MIN_TOKENS):
            self._apply_bias(logits, step, wants)
        counted = any_wants & PENALTY
        if counted:
            rows = self._index(self.counts.row_of[step.slots_host]).int()
            floats = self.slots.floats[step.slots]
            self.penalize(logits, self.counts.table, rows, floats[:, 3], floats[:, 4], floats[:, 5])
        if any_wants & RANDOM:
            floats, ints = self.slots.floats[step.slots], self.slots.ints[step.slots]
            tokens = self.sample(
                logits,
                floats[:, 0].contiguous(),
                ints[:, 0].int(),
                floats[:, 1].contiguous(),
                floats[:, 2].contiguous(),
                ints[:, 1].contiguous(),
                step.positions,
            )
            bad = self.nan_rows(logits) if before is None else before
        else:
            tokens, found = self.greedy(logits)
            bad = found if before is None else before
        pending = None
        if raw is not None:
            limits = [self._limit(self.slots.sampling[slot]) for slot in step.slots_host[asking]]
            pending = self.rank(raw, tokens[self._index(asking)], asking.tolist(), limits)
        if counted:  # last: a draw that finds no memory is made again
            self.count_tokens(self.counts.table, rows, tokens)
        return tokens, bad, pending

    def rank(self, raw: Tensor, tokens: Tensor, rows: list[int], limits: list[int]) -> PendingLogprobs:
        """Log probabilities and ranks of ``tokens`` under raw logits [n, V], and the best ``limits[i]`` of each row."""
        values, ranks = self.logprobs_of(raw, tokens)
        chosen = torch.stack((tokens.double(), values.double(), ranks.double()), dim=1)
        width = max(limits)
        top_values, top_ids = torch.topk(torch.log_softmax(raw, dim=-1), width, dim=-1)
        return PendingLogprobs(
            rows, limits, self.to_host(chosen), self.to_host(top_ids), self.to_host(top_values)
        )

    def to_host(self, tensor: Tensor) -> Tensor:
        """Start a copy to host memory; valid once an event recorded after it has passed."""
        if tensor.device.type == "cpu":
            return tensor
        target = self.platform.host_buffer(max(1, tensor.numel()), tensor.dtype)[: tensor.numel()]
        return target.view(tensor.shape).copy_(tensor, non_blocking=True)

    def _limit(self, sampling: SamplingParams | None) -> int:
        asked = sampling.logprobs if sampling is not None else 0
        return self.vocab_size if asked == -1 else min(asked or 0, self.vocab_size)

    def _index(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.int64)).to(
            self.platform.device, non_blocking=True
        )

    def _apply_masks(self, logits: Tensor, step: Prepared, masks: list[GrammarMask]) -> None:
        """Forbid what the grammars forbid: one bit a token, little-endian words."""
        place = {row: index for index, row in enumerate(step.rows)}
        self._take_penalties(logits, place, masks)
        chosen = [mask for mask in masks if mask.words and mask.row in place]
        if not chosen:
            return
        rows = self._index(np.asarray([place[mask.row] for mask in chosen]))
        bits = self._upload([np.frombuffer(mask.words, np.int32) for mask in chosen])
        for at in range(0, len(chosen), MASKED_ROWS):
            self.mask_logits(logits, rows[at : at + MASKED_ROWS], bits[at : at + MASKED_ROWS])

    def _upload(self, rows: list[np.ndarray]) -> Tensor:
        """Equally long int32 rows, through pinned memory: a copy from other memory would wait for the device."""
        count, width = len(rows), len(rows[0])
        pinned = self.platform.host_buffer(count * width, torch.int32)[: count * width].view(count, width)
        np.stack(rows, out=pinned.numpy())
        return pinned.to(self.platform.device, non_blocking=True)

    def _take_penalties(self, logits: Tensor, place: dict[int, int], masks: list[GrammarMask]) -> None:
        """Subtract what the engine takes from single tokens."""
        found = [
            (place[mask.row], token, -cost)
            for mask in masks
            if mask.penalties and mask.row in place
            for token, cost in mask.penalties[0].items()
        ]
        self._add(logits, found)

    def _add(self, logits: Tensor, found: list[tuple[int, int, float]]) -> None:
        """Add (row, token, amount) one by one."""
        if found:
            rows, tokens, values = zip(*found)
            where = (self._index(np.asarray(rows)), self._index(np.asarray(tokens)))
            amounts = torch.tensor(values, dtype=logits.dtype).to(self.platform.device, non_blocking=True)
            logits.index_put_(where, amounts, accumulate=True)

    def _apply_bias(self, logits: Tensor, step: Prepared, wants: np.ndarray) -> None:
        """Add logit_bias; forbid stop tokens until min_tokens are out."""
        found: list[tuple[int, int, float]] = []
        for row in np.flatnonzero(wants & (BIAS | MIN_TOKENS)):
            slot = int(step.slots_host[row])
            sampling = self.slots.sampling[slot]
            if sampling is None:
                continue
            found += [(int(row), token, value) for token, value in (sampling.logit_bias or {}).items()]
            generated = int(step.positions_host[row] - self.slots.num_prompt[slot])
            if generated < sampling.min_tokens:
                found += [(int(row), token, float("-inf")) for token in self.slots.stop_token_ids[slot]]
        self._add(logits, found)
