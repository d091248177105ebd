"""The torch runner: plans in, tokens out, on any device that torch and our ops know."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.device.ops.bind import Binder
from octavo.device.platform.base import Event, Platform
from octavo.engine.cache.layout import CacheLayout
from octavo.model.network import Network
from octavo.protocol.generate import Logprob
from octavo.protocol.plan import GrammarMask, StepPlan, StepResult
from octavo.runner.batch import BatchBuilder, Prepared
from octavo.runner.graphs import StepGraphs
from octavo.runner.pages import PageMemory
from octavo.runner.pooling import PendingVectors, Pooler
from octavo.runner.rescue import MESSAGE, Parts, attempt, part_of
from octavo.runner.sampling.sampler import PendingLogprobs, Sampler
from octavo.runner.slots import Slots

# Logits of this many prompt positions exist at a time when prompt_logprobs are asked (bounds the peak).
PROMPT_LOGITS = 128
PROMPT_CANDIDATES = (
    1 << 14
)  # the same bound for those who ask for many candidates, up to the whole vocabulary


@dataclass
class Drawn:
    """Tokens of some rows on their way to the host; all sampling rows of a step, unless memory is short."""

    rows: list[int]
    tokens: Tensor
    bad: Tensor
    logprobs: PendingLogprobs | None


@dataclass
class InFlight:
    """A sampled step whose result the host has not read yet."""

    plan: StepPlan
    drawn: list[Drawn]
    prompt: list[tuple[int, PendingLogprobs]]
    errors: dict[int, str]
    event: Event
    vectors: PendingVectors | None = None


class TorchRunner:
    """Implements ``engine.executor.base.Runner`` over a loaded network and its page memory."""

    def __init__(
        self,
        network: Network,
        pages: PageMemory,
        platform: Platform,
        binder: Binder,
        *,
        vocab_size: int,
        num_slots: int,
        max_tokens: int,
        max_model_len: int,
        agree: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """``agree``, where several ranks compute together, replaces drawn tokens, in place, by those of the rank that
        speaks for all."""
        self.network = network
        self.agree = agree
        self.pages = pages
        self.platform = platform
        self.layout: CacheLayout = pages.layout
        self.num_pages = pages.num_pages
        self.num_slots = num_slots
        self.max_tokens = max_tokens
        self.slots = Slots(num_slots, max_model_len, pages.layout, platform)
        self.builder = BatchBuilder(self.slots, platform, max_tokens, max_model_len)
        self.sampler = Sampler(self.slots, vocab_size, platform, binder)
        self.pooler = Pooler()
        self.graphs: StepGraphs | None = None
        self.current: tuple[StepPlan, Prepared, Tensor] | None = None
        self.errors: dict[int, str] = {}  # rows of the current step that found no memory
        self.in_flight: deque[InFlight] = deque()
        network.bind_cache(pages.places)

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> None:
        """See ``Runner.forward``."""
        self.pages.apply(plan.page_ops)
        self.slots.admit(plan.admits)
        self.sampler.admit(plan.admits)
        self.pooler.admit(plan.admits)
        if self.graphs is not None:
            ready = self.graphs.run(plan)
            if ready is not None:
                step, hidden = ready
                self.current = (plan, step, hidden)
                return
        step = self.builder.build(plan)
        self.current = (plan, step, self._hidden(plan, step))

    def _hidden(self, plan: StepPlan, step: Prepared) -> Tensor:
        """The forward pass, kernel by kernel."""
        if self.agree is not None:  # the others wait in the middle of a step: it cannot be repeated
            return self.network.forward(step.batch)
        hidden = attempt(lambda: self.network.forward(step.batch), self._release)
        if hidden is None:
            parts = Parts(self.builder.build, lambda part: self.network.forward(part.batch), self._release)
            hidden = parts.run(plan, self.network.spec.embedding.hidden, self.network.dtype)
            self.errors = parts.errors
        return hidden

    def _release(self) -> None:
        """Give cached memory back; nothing is in flight afterwards."""
        self.platform.synchronize()
        self.platform.close()

    @torch.inference_mode()
    def sample(self, masks: list[GrammarMask]) -> None:
        """See ``Runner.sample``."""
        if self.current is None:
            raise RuntimeError("sample() without forward()")
        plan, step, hidden = self.current
        self.current = None
        errors, self.errors = self.errors, {}
        count = len(step.rows)
        drawn = self._draw(hidden[:count], step, masks, errors) if count else []
        is_last = self.network.spec.is_last
        prompt = self._prompt_logprobs(plan, step, hidden[count:], errors) if is_last else []
        vectors = self._vectors(plan, step, hidden) if step.pooled_rows and is_last else None
        event = self.platform.event()
        event.record()
        self.in_flight.append(InFlight(plan, drawn, prompt, errors, event, vectors))

    def _vectors(self, plan: StepPlan, step: Prepared, hidden: Tensor) -> PendingVectors:
        """What the step adds to pooling sequences, and the vectors of those whose prompt it ends."""
        begin = len(step.rows) + sum(count for _, _, count in step.prompt_rows)
        rows, values = self.pooler.add(step, plan.slots, hidden[begin:])
        return PendingVectors(rows, self.sampler.to_host(values))

    def _draw(
        self, hidden: Tensor, step: Prepared, masks: list[GrammarMask], errors: dict[int, str]
    ) -> list[Drawn]:
        """Draw for all sampling rows at once; where memory is short, in halves."""

        def work() -> Drawn:
            tokens = torch.zeros(len(step.rows), dtype=torch.int64, device=self.platform.device)
            bad, pending = tokens.bool(), None
            if self.network.spec.is_last:  # only a model's last stage has logits
                logits = self.network.logits(hidden)
                bad = logits.isnan().any(dim=-1)
                tokens, pending = self.sampler.draw(logits, step, masks)
            if self.agree is not None:
                tokens = self.agree(tokens)
            self.slots.last_token[step.slots] = tokens
            return Drawn(step.rows, self.sampler.to_host(tokens), self.sampler.to_host(bad), pending)

        if self.agree is not None:  # ranks that draw together cannot repeat a part alone
            return [work()]
        found = attempt(work, self._release)
        if found is not None:
            return [found]
        count = len(step.rows)
        if count == 1:
            errors[step.rows[0]] = MESSAGE
            return []
        halves = [(0, count // 2), (count // 2, count)]
        return [
            drawn
            for begin, end in halves
            for drawn in self._draw(hidden[begin:end], part_of(step, begin, end), masks, errors)
        ]

    def collect(self) -> StepResult:
        """See ``Runner.collect``."""
        done = self.in_flight.popleft()
        done.event.synchronize()
        tokens: list[list[int]] = [[] for _ in range(done.plan.num_rows)]
        errors = done.errors
        table: list[list[list[Logprob]] | None] | None = None
        for part in done.drawn:
            for row, token in zip(part.rows, part.tokens.tolist()):
                tokens[row] = [token]
            for i in np.flatnonzero(part.bad.numpy()):
                errors.setdefault(part.rows[i], "The model produced NaN for this request.")
            if part.logprobs is not None:
                table = table or [None] * done.plan.num_rows
                for index, candidates in part.logprobs.per_row().items():
                    table[part.rows[index]] = [candidates]
        result = StepResult(step=done.plan.step, tokens=tokens, errors=errors or None, logprobs=table)
        if done.prompt:
            prompts: list[list[list[Logprob]] | None] = [None] * done.plan.num_rows
            for row, pending in done.prompt:
                found = pending.per_row()
                prompts[row] = (prompts[row] or []) + [found[i] for i in sorted(found)]
            result.prompt_logprobs = prompts
        if done.vectors is not None:
            done.vectors.into(result)
        return result

    def close(self) -> None:
        """See ``Runner.close``."""
        self.in_flight.clear()
        self.graphs = None
        self.platform.close()

    def _prompt_logprobs(
        self, plan: StepPlan, step: Prepared, hidden: Tensor, errors: dict[int, str]
    ) -> list[tuple[int, PendingLogprobs]]:
        """Log probabilities of the prompt tokens that rows asked for, in pieces of ``PROMPT_LOGITS`` positions."""
        found: list[tuple[int, PendingLogprobs]] = []
        begin = 0
        for row, first, count in step.prompt_rows:
            slot = plan.slots[row]
            sampling = self.slots.sampling[slot]
            asked = (sampling.prompt_logprobs if sampling is not None else 0) or 0
            limit = self.sampler.vocab_size if asked == -1 else asked
            piece = max(1, min(PROMPT_LOGITS, PROMPT_CANDIDATES // max(1, limit)))
            for at in range(0, count, piece):
                size = min(piece, count - at)
                known = self.slots.known[slot][first + at + 1 : first + at + size + 1]
                pending = self._ranked(hidden[begin + at : begin + at + size], known, limit)
                if pending is None:
                    errors[row] = MESSAGE
                    break
                found.append((row, pending))
            begin += count
        return found

    def _ranked(self, hidden: Tensor, known: NDArray[np.int64], limit: int) -> PendingLogprobs | None:
        """Log probabilities of known tokens and of ``limit`` candidates beside each; None where memory is short."""
        size = len(hidden)

        def work() -> PendingLogprobs:
            target = torch.from_numpy(known).to(self.platform.device, non_blocking=True)
            logits = self.network.logits(hidden)
            return self.sampler.rank(logits, target, list(range(size)), [limit] * size)

        return work() if self.agree is not None else attempt(work, self._release)
