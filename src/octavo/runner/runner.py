"""The torch runner: plans in, tokens out, on any device that torch and our ops know."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
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
from octavo.runner.sampling.sampler import PendingLogprobs, Sampler
from octavo.runner.slots import Slots

# Logits of this many prompt positions exist at a time when prompt_logprobs are asked (bounds the peak).
PROMPT_LOGITS = 128


@dataclass
class InFlight:
    """A sampled step whose result the host has not read yet."""

    plan: StepPlan
    rows: list[int]
    tokens: Tensor
    bad: Tensor
    logprobs: PendingLogprobs | None
    prompt: list[tuple[int, PendingLogprobs]]
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
    ) -> None:
        self.network = network
        self.pages = pages
        self.platform = platform
        self.layout: CacheLayout = pages.layout
        self.num_pages = pages.num_pages
        self.num_slots = num_slots
        self.max_tokens = max_tokens
        self.slots = Slots(num_slots, max_model_len, pages.layout, platform.device)
        self.builder = BatchBuilder(self.slots, platform, max_tokens, max_model_len)
        self.sampler = Sampler(self.slots, vocab_size, platform, binder)
        self.pooler = Pooler()
        self.graphs: StepGraphs | None = None
        self.current: tuple[StepPlan, Prepared, Tensor] | None = None
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
        self.current = (plan, step, self.network.forward(step.batch))

    @torch.inference_mode()
    def sample(self, masks: list[GrammarMask]) -> None:
        """See ``Runner.sample``."""
        if self.current is None:
            raise RuntimeError("sample() without forward()")
        plan, step, hidden = self.current
        self.current = None
        count = len(step.rows)
        tokens = torch.zeros(0, dtype=torch.int64, device=self.platform.device)
        bad, pending = tokens, None
        if count:
            logits = self.network.logits(hidden[:count])
            bad = logits.isnan().any(dim=-1)
            tokens, pending = self.sampler.draw(logits, step, masks)
            self.slots.last_token[step.slots] = tokens
        prompt = self._prompt_logprobs(plan, step, hidden[count:])
        vectors = None
        if step.pooled_rows:
            begin = count + sum(size for _, _, size in step.prompt_rows)
            complete, values = self.pooler.add(step, plan.slots, hidden[begin:])
            vectors = PendingVectors(complete, self.sampler.to_host(values))
        event = self.platform.event()
        done = InFlight(
            plan,
            step.rows,
            self.sampler.to_host(tokens),
            self.sampler.to_host(bad),
            pending,
            prompt,
            event,
            vectors,
        )
        event.record()
        self.in_flight.append(done)

    def collect(self) -> StepResult:
        """See ``Runner.collect``."""
        done = self.in_flight.popleft()
        done.event.synchronize()
        tokens: list[list[int]] = [[] for _ in range(done.plan.num_rows)]
        for row, token in zip(done.rows, done.tokens.tolist()):
            tokens[row] = [token]
        errors = None
        if done.bad.any():
            errors = {
                done.rows[i]: "The model produced NaN for this request."
                for i in np.flatnonzero(done.bad.numpy())
            }
        result = StepResult(step=done.plan.step, tokens=tokens, errors=errors)
        if done.logprobs is not None:
            table: list[list[list[Logprob]] | None] = [None] * done.plan.num_rows
            for index, candidates in done.logprobs.per_row().items():
                table[done.rows[index]] = [candidates]
            result.logprobs = table
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
        self, plan: StepPlan, step: Prepared, hidden: Tensor
    ) -> list[tuple[int, PendingLogprobs]]:
        """Log probabilities of the prompt tokens that rows asked for, in pieces of ``PROMPT_LOGITS`` positions."""
        found: list[tuple[int, PendingLogprobs]] = []
        begin = 0
        for row, first, count in step.prompt_rows:
            slot = plan.slots[row]
            sampling = self.slots.sampling[slot]
            asked = (sampling.prompt_logprobs if sampling is not None else 0) or 0
            limit = self.sampler.vocab_size if asked == -1 else asked
            for at in range(0, count, PROMPT_LOGITS):
                size = min(PROMPT_LOGITS, count - at)
                logits = self.network.logits(hidden[begin + at : begin + at + size])
                known = self.slots.known[slot][first + at + 1 : first + at + size + 1]
                target = torch.from_numpy(known).to(self.platform.device)
                found.append((row, self.sampler.rank(logits, target, list(range(size)), [limit] * size)))
            begin += count
        return found
