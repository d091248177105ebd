"""One loop over sequences and resources: what runs in the next step, and what its results mean.

``schedule`` plans on optimistic counts (every row in flight succeeds, every draft is accepted), ``apply`` corrects
them. A sequence that needs nothing new (``room`` left) costs a few integer operations and asks nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from octavo.engine.scheduler import stop
from octavo.engine.scheduler.pace import LEAST, Pace
from octavo.engine.scheduler.queue import Queue
from octavo.engine.scheduler.resources import Resource
from octavo.engine.scheduler.sequence import Sequence
from octavo.protocol.generate import FinishReason, Times, TokenDelta
from octavo.protocol.plan import StepPlan, StepResult

SHORT = 4  # a step with prompts that yield holds at most this part of what it may hold


@dataclass
class Counters:
    """What happened since the start."""

    num_preemptions: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    step_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_step_tokens: int = 0
    num_failed: int = 0
    accepted_at: list[int] = field(default_factory=list)
    iteration_tokens: list[int] = field(default_factory=lambda: [0] * 24)


@dataclass
class Step:
    """A plan and the sequences behind its rows."""

    plan: StepPlan
    rows: list[Sequence]
    launched_s: float = 0.0
    admitted: set[int] = field(default_factory=set)  # ids let in by this plan
    swapped: set[int] = field(default_factory=set)  # ids that lost their place to one of them


class Scheduler:
    """Fills steps from running and waiting sequences.

    ``max_num_batched_tokens`` bounds the rows' tokens of one step and may be changed at any time; ``pace`` says how many
    of them prompts may take (rows of one token always go first). ``now_s`` is the time at which sequences of this step
    are said to begin. With ``parts`` above 1 so many steps are under way at once, in which different sequences draw.
    """

    def __init__(
        self,
        resources: list[Resource],
        *,
        max_num_batched_tokens: int,
        pace: Pace | None = None,
        waiting: Queue | None = None,
        parts: int = 1,
    ) -> None:
        self.resources = resources
        self.parts = parts
        self.max_num_batched_tokens = max_num_batched_tokens
        self.pace = pace or Pace(0.0, max_num_batched_tokens)
        self.now_s = 0.0
        self.waiting = Queue() if waiting is None else waiting
        # Running sequences are in exactly one of these two: all known tokens queued, or not yet.
        self.decoding: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self.counters = Counters()
        self._preempted = False
        self._kept_free = 0  # of the prompt tokens of the step being planned: not for prompts that yield
        self._answers_waited = False
        self._applied = -1  # the last step whose results are known
        self._returning: dict[int, int] = {}  # preempted: the step whose results they wait for

    def running(self) -> Iterator[Sequence]:
        """All sequences that hold resources."""
        yield from self.decoding
        yield from self.prefilling

    @property
    def num_running(self) -> int:
        """How many sequences hold resources."""
        return len(self.decoding) + len(self.prefilling)

    # -- planning -----------------------------------------------------------------------------------------------

    def schedule(self) -> Step | None:
        """The next step, or None where nothing can run now."""
        step = Step(StepPlan(self.counters.num_steps, [], [], [], [], [], [], [], []), [])
        self._preempted = False
        most = self.max_num_batched_tokens
        first = self._tokens_before_answers() if self.waiting.charges else 0
        budget = self._decode_rows(step, most - first) + first
        self._fill_with_prompts(step, budget)
        if first and not step.rows:  # the prompt that answers waited for found no room
            self._fill_with_prompts(step, self._decode_rows(step, most))
        if self.waiting.charges:
            for seq, n, sample in zip(step.rows, step.plan.num_tokens, step.plan.sample):
                self.waiting.charge(seq, n + sample)
        for resource in self.resources:
            resource.fill(step.plan)
        if not step.rows:
            return None
        counters = self.counters
        counters.num_steps += 1
        counters.step_tokens = sum(step.plan.num_tokens)
        counters.num_step_tokens += counters.step_tokens
        counters.iteration_tokens[min(counters.step_tokens.bit_length(), 23)] += 1
        return step

    def _decode_rows(self, step: Step, budget: int) -> int:
        """Rows of the sequences that wait only for their next token; they come first so that they never starve.

        This loop runs once a sequence a step: it is the hot path.
        """
        plan, rows = step.plan, step.rows
        starts, counts = plan.starts, plan.num_tokens
        # A copy, since a preemption changes the list.
        decoding = self.decoding[:] if self.parts == 1 else self._part()
        for place, seq in enumerate(decoding):
            n = 1 + seq.num_drafts
            if n > seq.room or n > budget:
                if budget <= 0:
                    # A budget below the number of sequences: who got nothing comes first in the next step.
                    left = [other for other in decoding[place:] if other.slot >= 0]
                    self.decoding = left + [other for other in self.decoding if other not in left]
                    break
                n = self._ask(seq, min(n, budget), step)
                if not n:
                    continue
            seq.room -= n
            budget -= n
            start = seq.num_queued
            seq.num_queued = start + n
            rows.append(seq)
            starts.append(start)
            counts.append(n)
        # Columns that say nothing new are filled at once; a preemption above has only these three to undo.
        plan.slots.extend([seq.slot for seq in rows])
        plan.num_drafts.extend([n - 1 for n in counts])
        plan.sample.extend([True] * len(rows))
        return budget

    def _tokens_before_answers(self) -> int:
        """Tokens kept for the prompt of somebody whom the policy puts before others, if their answers would split it.

        Answers then wait for one step, never for two in a row.
        """
        if self._answers_waited:
            self._answers_waited = False
            return 0
        most = min(self.max_num_batched_tokens, self.pace.budget())
        beside = most - len(self.decoding)
        waiting = self.waiting.peek()
        prompts = self.prefilling if waiting is None else [*self.prefilling, waiting]
        first = min(prompts, key=self.waiting.rank, default=None)
        if first is None or len(first.tokens) <= beside:
            return 0
        if first is waiting:
            for resource in self.resources:
                resource.prepare(first)
        n = len(first.tokens) - first.num_queued
        if not beside < n <= most:
            return 0
        others = [seq for seq in self.decoding if self.waiting.precedes(first, seq)]
        if not others:
            return 0
        self._answers_waited = True
        self.decoding = [seq for seq in self.decoding if seq not in others] + others
        return n

    def _fill_with_prompts(self, step: Step, budget: int) -> None:
        """Rows of prompts beside those of answers; ``budget`` tokens are left in the step."""
        answers = self.max_num_batched_tokens - budget
        unqueued = sum([len(seq.tokens) - seq.num_queued for seq in self.prefilling])
        budget = min(budget, self.pace.prompts(answers, unqueued + self.waiting.num_tokens))
        short = min(self.max_num_batched_tokens, self.pace.budget()) // SHORT
        self._kept_free = budget - max(short - answers, LEAST)
        budget = self._prefill_rows(step, budget)
        self._admit_waiting(step, budget)

    def _allowed(self, seq: Sequence, budget: int) -> int:
        """How many of the ``budget`` tokens left in the step the prompt of ``seq`` may take."""
        if self._kept_free > 0 and self.waiting.yields(seq, self.max_num_batched_tokens):
            budget -= self._kept_free
        return min(len(seq.tokens) - seq.num_queued, budget)

    def _part(self) -> list[Sequence]:
        """This step's share of the sequences that decode, of those whose last token is known."""
        known = [seq for seq in self.decoding if seq.num_queued < len(seq.tokens)]
        return known[: -(-len(self.decoding) // self.parts)]

    def _prefill_rows(self, step: Step, budget: int) -> int:
        """Chunks of the sequences that have known tokens left to compute, oldest first (see ``Queue.rank``)."""
        for seq in sorted(self.prefilling, key=self.waiting.rank):
            budget = self._admit_waiting(step, budget, before=seq)
            if budget <= 0:
                break
            allowed = self._allowed(seq, budget)
            if allowed > 0 and (n := self._ask(seq, allowed, step)):
                budget -= n
                self._add_chunk(seq, n, step)
        return budget

    def _admit_waiting(self, step: Step, budget: int, *, before: Sequence | None = None) -> int:
        """Let waiting sequences in, strictly in order, while everything they need is there; returns the budget left.

        Never after a preemption in this call: what was just freed belongs to the one who needed it. With ``before``
        only those whose policy puts them before that running sequence's prompt.
        """
        while budget > 0 and not self._preempted:
            seq = self.waiting.peek()
            if seq is None or seq.id in step.swapped or self._returning.get(seq.id, -1) > self._applied:
                break
            if before is not None and not self.waiting.precedes(seq, before):
                break
            for resource in self.resources:
                resource.prepare(seq)
            allowed = self._allowed(seq, budget)
            if allowed <= 0 or not (n := self._admit_or_swap(seq, allowed, step)):
                break
            self.waiting.take(seq)
            self._returning.pop(seq.id, None)
            step.admitted.add(seq.id)
            self.prefilling.append(seq)
            seq.commit_at = 0
            seq.prompt_logprobs = None  # after a preemption they are computed again
            self._reserve(seq, n)
            if seq.num_cached < 0:  # the first time, not after a preemption
                seq.num_cached = seq.num_computed
                seq.admitted_s = self.now_s
                self.counters.num_prompt_tokens += seq.num_prompt
                self.counters.num_cached_prompt_tokens += seq.num_cached
            budget -= n
            self._add_chunk(seq, n, step)
        return budget

    def _admit_or_swap(self, seq: Sequence, n: int, step: Step) -> int:
        """``_admit`` for a waiting sequence, to which the policy may give others' places.

        Only places of sequences that were let in before this call: what a plan brings in it does not throw out again.
        """
        wanted = n
        if (n := self._admit(seq, wanted)) or not self.waiting.charges:
            return n
        while not n:
            old = [other for other in self.running() if other.id not in step.admitted]
            victim = self.waiting.victim(seq, old)
            if victim is None:
                break
            self._preempt(victim, step)
            step.swapped.add(victim.id)
            n = self._admit(seq, wanted)
        else:
            self._preempted = False  # the place is taken by the one it was made for
        return n

    def _add_chunk(self, seq: Sequence, n: int, step: Step) -> None:
        """A row of known tokens; the one that reaches their end draws the next token."""
        plan = step.plan
        step.rows.append(seq)
        plan.slots.append(seq.slot)
        plan.starts.append(seq.num_queued)
        plan.num_tokens.append(n)
        plan.num_drafts.append(0)
        seq.num_queued += n
        seq.room -= n
        last = seq.num_queued == len(seq.tokens)
        plan.sample.append(last and seq.pooling is None)
        if last:
            self.prefilling.remove(seq)
            self.decoding.append(seq)

    # -- resources ----------------------------------------------------------------------------------------------

    def _admit(self, seq: Sequence, n: int) -> int:
        for resource in self.resources:
            n = resource.admit(seq, n)
            if n <= 0:
                return 0
        return n

    def _reserve(self, seq: Sequence, n: int) -> None:
        room = seq.max_len - 1 - seq.num_queued
        for resource in self.resources:
            room = min(room, resource.reserve(seq, n))
        seq.room = room

    def _ask(self, seq: Sequence, n: int, step: Step) -> int:
        """How many of ``n`` tokens a running sequence may queue; takes what they need, from others if it must.

        Progress is certain: the sequence that is first in order can take from everybody else, and alone it fits
        (checked when it was submitted). A sequence with rows in flight may hold pages that the result will free,
        so it waits for that rather than give up itself.
        """
        if seq.slot < 0:  # preempted earlier in this call
            return 0
        n = min(n, seq.max_len - 1 - seq.num_queued)
        if n <= 0:  # what is in flight will end it
            return 0
        while True:
            granted = self._admit(seq, n)
            if granted:
                self._reserve(seq, granted)
                return granted
            victim = max(self.running(), key=_by_key)
            if victim is seq and seq.num_queued > seq.num_computed:
                return 0
            self._preempt(victim, step)
            if victim is seq:
                return 0

    def _preempt(self, seq: Sequence, step: Step) -> None:
        """Take everything from a sequence and put it back in line; its tokens are kept, the rest is recomputed.

        A row of it in this very plan is taken out again. A row in flight stays valid: ``apply`` appends its tokens, and
        only then it may come back.
        """
        self._returning[seq.id] = self.counters.num_steps - 1
        if seq in step.rows:
            self._take_back(step, step.rows.index(seq))
        self._put_back(seq)
        self._preempted = True

    def put_back_all(self) -> None:
        """Every running sequence back in line, to be computed from the start; only while no step is in flight."""
        for seq in list(self.running()):
            self._put_back(seq)

    def _put_back(self, seq: Sequence) -> None:
        self._release(seq)
        seq.num_computed = seq.num_queued = seq.room = seq.num_drafts = 0
        seq.drafts = []
        self.waiting.push(seq)
        self.counters.num_preemptions += 1

    def _take_back(self, step: Step, row: int) -> None:
        """Remove a row from the plan being made."""
        plan = step.plan
        if row < len(
            plan.sample
        ):  # else we are in the middle of the decode rows, and these are not filled yet
            del plan.slots[row], plan.num_drafts[row], plan.sample[row]
        del step.rows[row], plan.starts[row], plan.num_tokens[row]

    def _release(self, seq: Sequence) -> None:
        """The one place where a running sequence loses what it holds."""
        running = self.prefilling if seq in self.prefilling else self.decoding
        running.remove(seq)
        self.waiting.leave(seq)
        for resource in self.resources:
            resource.release(seq)

    # -- results ------------------------------------------------------------------------------------------------

    def apply(self, step: Step, result: StepResult) -> list[TokenDelta]:
        """Correct the counts by what the step really drew; returns what to tell the clients.

        Rows of sequences that have ended meanwhile are ignored. Rows of sequences preempted meanwhile bring valid
        tokens, but no computed pages. A plain row (one token drawn, nothing else to say) is settled here, in the
        second hot path; everything else goes through ``_settle``.
        """
        plan = step.plan
        self._applied = plan.step
        deltas: list[TokenDelta] = []
        plain = not (
            result.errors or result.num_drafts or result.logprobs or result.prompt_logprobs or result.pooled
        )
        for row, (seq, n, drawn) in enumerate(zip(step.rows, plan.num_tokens, result.tokens)):
            if plain and n == 1 and len(drawn) == 1 and seq.slot >= 0 and seq.is_simple:
                token, tokens = drawn[0], seq.tokens
                if token not in seq.stop_ids and len(tokens) + 1 < seq.max_len:
                    tokens.append(token)
                    seq.num_computed = computed = seq.num_computed + 1
                    delta = TokenDelta(seq.id, drawn, None, None, None, seq.num_cached)
                    if computed >= seq.commit_at:
                        self._confirm(seq)
                        if len(tokens) == seq.num_prompt + 1:
                            delta.times = self._times(seq)
                    deltas.append(delta)
                    continue
            if not seq.finished:
                settled = self._settle(seq, plan, result, row)
                if settled is not None:
                    deltas.append(settled)
        self.counters.num_generation_tokens += sum([len(delta.tokens) for delta in deltas])
        return deltas

    def _settle(self, seq: Sequence, plan: StepPlan, result: StepResult, row: int) -> TokenDelta | None:
        """One row's result in full."""
        if result.errors is not None and row in result.errors:
            return self.fail(seq, result.errors[row])
        if result.prompt_logprobs is not None and len(seq.tokens) == seq.num_prompt:  # else told before
            seq.prompt_logprobs = (seq.prompt_logprobs or []) + (result.prompt_logprobs[row] or [])
        if result.pooled is not None and row in result.pooled:
            return self._pooled(seq, result.pooled[row])
        drawn, n, sampled = result.tokens[row], plan.num_tokens[row], plan.sample[row]
        if sampled:
            if not drawn:
                return self.fail(seq, "The runner drew no token for this request.")
            drafts = plan.num_drafts[row]
            if drafts:
                n -= self._reject(seq, drafts, 1 + drafts - len(drawn))
        if seq.slot >= 0:
            seq.num_computed += n
            if seq.num_computed >= seq.commit_at:
                self._confirm(seq)
            self._note_drafts(seq, result, row)
        return self._deliver(seq, drawn, result, row) if sampled else None

    def _confirm(self, seq: Sequence) -> None:
        seq.commit_at = min([resource.confirm(seq) for resource in self.resources])

    def _reject(self, seq: Sequence, drafts: int, rejected: int) -> int:
        """Take back the optimism about rejected drafts; returns their number."""
        self.counters.num_drafts += 1
        self.counters.num_draft_tokens += drafts
        self.counters.num_accepted_tokens += drafts - rejected
        accepted_at = self.counters.accepted_at
        accepted_at.extend([0] * (drafts - len(accepted_at)))
        for place in range(drafts - rejected):
            accepted_at[place] += 1
        if seq.slot >= 0:
            seq.num_queued -= rejected
            seq.room += rejected
        return rejected

    def _note_drafts(self, seq: Sequence, result: StepResult, row: int) -> None:
        """Remember what the runner offers for the next row; a constraint must see drafts to allow them."""
        if not result.num_drafts:
            seq.num_drafts = 0
        elif seq.constraint is None:
            seq.num_drafts = result.num_drafts[row]
        elif result.draft_tokens is not None:
            seq.drafts = result.draft_tokens[row]
            seq.num_drafts = len(seq.drafts)

    def _deliver(self, seq: Sequence, drawn: list[int], result: StepResult, row: int) -> TokenDelta:
        """Append drawn tokens, end the sequence where they end it."""
        tokens, reason, stop_token = stop.append(seq, drawn)
        if seq.constraint is not None:
            for count, token in enumerate(tokens, 1):
                seq.constraint.accept(token)
                if seq.constraint.ended:  # nothing can follow: min_tokens and ignore_eos cannot change that
                    tokens = tokens[:count]
                    reason = "stop"
                    if tokens[-1] != stop_token:
                        stop_token = None
                    break
        delta = TokenDelta(seq.id, tokens, reason, stop_token, None, seq.num_cached)
        if len(seq.tokens) == seq.num_prompt + len(drawn):
            delta.times = self._times(seq)
        if result.logprobs is not None:
            found = result.logprobs[row]
            delta.logprobs = found if found is None else found[: len(tokens)]
        if seq.prompt_logprobs:
            delta.prompt_logprobs = seq.prompt_logprobs
            seq.prompt_logprobs = None
        if reason is not None:
            self.finish(seq)
        return delta

    def _pooled(self, seq: Sequence, vector: bytes) -> TokenDelta:
        """A pooling sequence is complete: its vector is all there is to tell."""
        self.finish(seq)
        return TokenDelta(seq.id, [], "stop", num_cached_tokens=max(0, seq.num_cached), embedding=vector)

    def _times(self, seq: Sequence) -> Times:
        return Times(seq.admitted_s - seq.arrived_s, self.now_s - seq.admitted_s)

    def fail(self, seq: Sequence, message: str, reason: FinishReason = "error") -> TokenDelta:
        """End a sequence that cannot go on; returns what to tell its client."""
        seq.failed = True
        self.counters.num_failed += 1
        self.finish(seq)
        return TokenDelta(seq.id, [], reason, None, message, max(0, seq.num_cached))

    def finish(self, seq: Sequence) -> None:
        """End a sequence at any point: running, waiting, or with rows in flight (their results are ignored)."""
        seq.finished = True
        self._returning.pop(seq.id, None)
        if seq.slot >= 0:
            self._release(seq)
        else:
            self.waiting.remove(seq)


def _by_key(seq: Sequence) -> tuple[float, ...]:
    return seq.key
