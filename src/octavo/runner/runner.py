"""The torch runner: plans in, tokens out, on any device that torch and our ops know."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.device.ops.bind import Binder
from octavo.device.platform.base import Event, Platform
from octavo.engine.cache.layout import CacheLayout
from octavo.model.face import AnyNetwork
from octavo.protocol.generate import Logprob
from octavo.protocol.plan import GrammarMask, StepPlan, StepResult
from octavo.runner.batch import BatchBuilder, Prepared
from octavo.runner.graphs import StepGraphs
from octavo.runner.late import LateQueue, LateTokens
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
    vectors: Sequence[PendingVectors] = ()
    late: LateTokens | None = None


class TorchRunner:
    """Implements ``engine.executor.base.Runner`` over a loaded network and its page memory."""

    def __init__(
        self,
        network: AnyNetwork,
        pages: PageMemory,
        platform: Platform,
        binder: Binder,
        *,
        vocab_size: int,
        num_slots: int,
        max_tokens: int,
        max_model_len: int,
        agree: Callable[[Tensor], Callable[[], object]] | None = None,
        tells: bool = True,
    ) -> None:
        """``agree``, where several ranks compute together, begins to replace drawn tokens, in place, by those of the rank
        that speaks for all, and returns what waits for that. Results of a runner that does not ``tell`` are empty."""
        self.network = network
        self.agree = agree
        self.tells = tells
        self.pages = pages
        self.platform = platform
        self.layout: CacheLayout = pages.layout
        self.num_pages = pages.num_pages
        self.num_slots = num_slots
        self.max_tokens = max_tokens
        self.slots = Slots(num_slots, max_model_len, pages.layout, platform)
        self.builder = BatchBuilder(self.slots, platform, max_tokens, max_model_len, binder)
        self.sampler = Sampler(self.slots, vocab_size, platform, binder)
        self.pooler = Pooler()
        self.graphs: StepGraphs | None = None
        self.current: tuple[StepPlan, Prepared, Tensor] | None = None
        self.errors: dict[int, str] = {}  # rows of the current step that found no memory
        self.in_flight: deque[InFlight] = deque()
        self.late = LateQueue(self.slots, platform)
        network.bind_cache(pages.places)

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> None:
        """See ``Runner.forward``."""
        self.late.settle_for(plan.slots)
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
        self.platform.release()

    @torch.inference_mode()
    def sample(self, masks: list[GrammarMask]) -> None:
        """See ``Runner.sample``."""
        if self.current is None:
            raise RuntimeError("sample() without forward()")
        plan, step, hidden = self.current
        self.current = None
        errors, self.errors = self.errors, {}
        count = len(step.rows)
        is_last = self.network.spec.is_last
        drawn, late = [], None
        if count and is_last:
            drawn = self._draw(hidden[:count], step, masks, errors)
        elif count:
            late = self._await(step)
        prompt = self._prompt_logprobs(plan, step, hidden[count:], errors) if is_last else []
        vectors = self._vectors(plan, step, hidden) if step.pooled_rows and is_last else ()
        event = self.platform.event()
        event.record()
        self.in_flight.append(InFlight(plan, drawn, prompt, errors, event, vectors, late))

    def _vectors(self, plan: StepPlan, step: Prepared, hidden: Tensor) -> list[PendingVectors]:
        """What the step adds to pooling sequences, and the vectors of those whose prompt it ends."""
        begin = len(step.rows) + sum(count for _, _, count in step.prompt_rows)
        rows, values = self.pooler.add(step, plan.slots, hidden[begin:])
        told = [i for i, row in enumerate(rows) if self.slots.pooling[plan.slots[row]] == "classify"]
        classifier = self.network.classifier
        if not told or classifier is None:
            return [PendingVectors(rows, self.sampler.to_host(values))]
        plain = [i for i in range(len(rows)) if i not in told]
        classes = classifier(values[told].to(self.network.dtype)).float()
        found = [PendingVectors([rows[i] for i in told], self.sampler.to_host(classes))]
        if plain:
            found.append(PendingVectors([rows[i] for i in plain], self.sampler.to_host(values[plain])))
        return found

    def _await(self, step: Prepared) -> LateTokens:
        """What the last stage will draw for this step."""
        tokens = torch.zeros(len(step.rows), dtype=torch.int64, device=self.platform.device)
        if self.agree is None:
            raise RuntimeError("a stage of a pipeline is alone")
        return self.late.add(step, tokens, self.agree(tokens))

    def _draw(
        self, hidden: Tensor, step: Prepared, masks: list[GrammarMask], errors: dict[int, str]
    ) -> list[Drawn]:
        """Draw for all sampling rows at once; where memory is short, in halves."""

        def work() -> Drawn:
            tokens, bad, pending = self.sampler.draw(self.network.logits(hidden), step, masks)
            if self.agree is not None:
                self.agree(tokens)()
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
        tokens: list[list[int]] = [[] for _ in range(done.plan.num_rows)]
        if not self.tells:
            return StepResult(step=done.plan.step, tokens=tokens)
        done.event.synchronize()
        if done.late is not None:
            for row, token in zip(done.late.rows, self.late.read(done.late).tolist()):
                tokens[row] = [token]
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
        for vectors in done.vectors:
            vectors.into(result)
        return result

    def close(self) -> None:
        """See ``Runner.close``."""
        self.in_flight.clear()
        self.graphs = None
        self.platform.bound(None)
        self.platform.release()

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
            logits = self.network.logits(hidden).float()
            return self.sampler.rank(logits, target, list(range(size)), [limit] * size)

        return work() if self.agree is not None else attempt(work, self._release)
