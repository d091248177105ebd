"""The engine's loop: requests in, tokens out. Everything it does happens in ``step``.

    depth 0    schedule N   forward N                          sample N   collect N    apply N
    depth 1    schedule N   forward N   collect N-1 apply N-1  sample N                (host work hides under forward N)
    pipeline   schedule N   forward N                          sample N   collect N-k  apply N-k

All are the same lines; only the place of ``collect`` differs. In a pipeline k more steps are under way, one for each
further stage, none of which draws for a sequence of another.
"""

from __future__ import annotations

import random
import secrets
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from octavo.engine.cache.layout import CacheLayout
from octavo.engine.cache.watch import PageWatch
from octavo.engine.executor.base import Executor
from octavo.engine.relief import Relief
from octavo.engine.scheduler.expiry import Expiry
from octavo.engine.scheduler.pace import Pace
from octavo.engine.scheduler.queue import make_queue, order_key
from octavo.engine.scheduler.resources import Pages, Slots
from octavo.engine.scheduler.scheduler import Scheduler, Step
from octavo.engine.scheduler.sequence import Constraint, Sequence
from octavo.engine.scheduler.siblings import Siblings
from octavo.engine.settings import EngineSettings
from octavo.engine.structured.compiler import GrammarCompiler
from octavo.engine.structured.dry import DryPenalty
from octavo.engine.structured.grammar import GrammarError
from octavo.engine.structured.lobby import Lobby
from octavo.engine.structured.rules import TokenRules
from octavo.engine.structured.thinking import ThinkingConstraint
from octavo.engine.validate import check_request
from octavo.errors import OutOfMemoryError, QueueFullError, RequestError
from octavo.protocol.control import (
    FRONT_SHIFT,
    CheckPool,
    Control,
    ControlReply,
    DropFront,
    EngineInfo,
    EngineStats,
    GetInfo,
    GetStats,
    ResetPrefixCache,
    Shutdown,
)
from octavo.protocol.generate import FinishReason, GenerateRequest, TokenDelta
from octavo.protocol.plan import GrammarMask


class EngineCore:
    """One engine over one executor. Not thread-safe: one thread calls everything.

    ``info.max_model_len`` is the asked length or what the page pool holds for one sequence, whichever is less, so
    a request that passes ``submit`` can always run to its end. Raises ``OutOfMemoryError`` where the pool holds not
    even two tokens. Without ``grammars`` requests that bring a grammar are refused. ``clock`` (seconds) is what
    deadlines, waiting times and the pace of steps are measured by.
    """

    def __init__(
        self,
        executor: Executor,
        settings: EngineSettings,
        grammars: GrammarCompiler | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.executor = executor
        self.settings = settings
        self.pages = Pages(
            executor.layout,
            executor.num_pages,
            root_key=secrets.token_bytes(32),
            prefix_caching=settings.enable_prefix_caching,
            watch=PageWatch(settings.watched_pages, clock) if settings.watched_pages else None,
        )
        self.pace = _pace_of(settings)
        self.scheduler = Scheduler(
            [Slots(min(settings.max_num_seqs, executor.num_slots)), self.pages],
            max_num_batched_tokens=settings.max_num_batched_tokens,
            pace=self.pace,
            waiting=make_queue(settings.scheduling_policy),
            parts=settings.max_concurrent_batches,
        )
        self._clock = clock
        self.expiry = Expiry()
        self.siblings = Siblings()
        self._num_rejected = self._num_deadlines = 0
        self._last_done_s = 0.0
        self.stopping = False
        self._most_in_flight = settings.max_concurrent_batches
        self._overlaps = settings.overlap and self._most_in_flight == 1
        self.lobby = None if grammars is None else Lobby(grammars)
        self.relief: Relief | None = None
        self._failed: list[TokenDelta] = []  # told by the next step
        self._live: dict[int, Sequence] = {}
        self._in_flight: deque[Step] = deque()
        self._arrivals = 0
        self._seeds = random.Random(settings.seed)
        self.info = self._describe()

    def _describe(self) -> EngineInfo:
        settings, layout = self.settings, self.executor.layout
        sizes = [group.spec.page_size for group in layout.groups]
        return EngineInfo(
            model=settings.model,
            architecture=settings.architecture,
            vocab_size=settings.vocab_size,
            max_model_len=_fitting_length(layout, self.executor.num_pages, settings.max_model_len),
            max_num_seqs=min(settings.max_num_seqs, self.executor.num_slots),
            max_num_batched_tokens=settings.max_num_batched_tokens,
            page_size=min(sizes, default=0),
            num_pages=self.executor.num_pages,
            dtype=settings.dtype,
            device=settings.device,
            kernels=settings.kernels,
            timeline_s=settings.timeline_s,
            memory_bytes=settings.memory_bytes,
            max_queue_len=settings.max_queue_len,
            facts=settings.facts,
        )

    # -- requests -----------------------------------------------------------------------------------------------

    def submit(self, request: GenerateRequest, constraint: Constraint | None = None) -> None:
        """Queue a request; raises ``RequestError`` or ``QueueFullError`` and then changes nothing."""
        check_request(request, self.info)
        if request.id in self._live:
            raise RequestError(f"Request id {request.id} is already running.", "id")
        if request.grammar is not None and self.lobby is None:
            raise RequestError("This engine serves no grammars.", "structured_outputs")
        if self.num_waiting >= self.settings.max_queue_len + self._idle_slots():
            self._num_rejected += 1
            raise QueueFullError(f"{self.num_waiting} requests are waiting already.")
        self._arrivals += 1
        seq = Sequence(
            request,
            key=order_key(self.settings.scheduling_policy, request, self._arrivals),
            max_model_len=self.info.max_model_len,
            seed=self._seeds.getrandbits(63),
            table=self.pages.table(),
            constraint=constraint,
            arrived_s=self._clock(),
        )
        self._live[request.id] = seq
        self.expiry.add(seq, request.terms)
        if request.grammar is not None and self.lobby is not None:
            self.lobby.add(seq, request.grammar, partial(self._constrain, request))
        else:
            self._constrain(request, seq, constraint)
            self._enqueue(seq)

    def _enqueue(self, seq: Sequence) -> None:
        """Put a sequence in line, or beside it while another computes the prompt that both share."""
        leader = None if seq.leader is None else self._live.get(seq.leader)
        shares = self.pages.prefix_caching and seq.sampling.prompt_logprobs is None
        if shares and leader is not None and len(leader.tokens) == leader.num_prompt:
            self.siblings.hold(leader.id, seq)
        else:
            self.scheduler.waiting.push(seq)

    def _constrain(self, request: GenerateRequest, seq: Sequence, grammar: Constraint | None) -> None:
        """Bind a sequence to its grammar, which begins behind the thoughts, if there are any, and to its token rules."""
        if request.thinking is not None:
            grammar = ThinkingConstraint(
                request.thinking, grammar, vocab_size=self.info.vocab_size, stop_ids=seq.stop_ids
            )
        allowed = seq.sampling.allowed_token_ids
        if allowed is not None or request.bad_words:
            grammar = TokenRules(allowed, request.bad_words, grammar, vocab_size=self.info.vocab_size)
        if request.dry is not None:
            grammar = DryPenalty(request.dry, seq.tokens, grammar)
        seq.constraint = grammar
        seq.is_simple = grammar is None and seq.is_simple

    def abort(self, ids: list[int]) -> None:
        """End requests now; unknown ids are ignored. No delta follows."""
        for id in ids:
            seq = self._live.get(id)
            if seq is not None:
                self._end(seq)

    def _end(self, seq: Sequence) -> None:
        """End a sequence wherever it is: beside the line, in it, or running."""
        if (self.lobby is not None and self.lobby.remove(seq)) or self.siblings.remove(seq):
            seq.finished = True
        else:
            self.scheduler.finish(seq)
        self._forget(seq.id)

    def _forget(self, id: int) -> None:
        """A request is over: nobody needs to wait for it any more."""
        del self._live[id]
        for seq in self.siblings.leave(id):
            self.scheduler.waiting.push(seq)

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would do anything."""
        return bool(self._live or self._in_flight or self._failed)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue and beside it."""
        return len(self.scheduler.waiting) + self._num_deferred

    @property
    def _num_deferred(self) -> int:
        """Those beside the queue: their grammar is being compiled, or another computes their prompt."""
        return len(self.siblings) + (0 if self.lobby is None else len(self.lobby))

    # -- the loop -----------------------------------------------------------------------------------------------

    def step(self) -> list[TokenDelta]:
        """Run one step; returns what it (with overlap: the one before) brought."""
        drains = self.relief is not None and self._take_over(self.relief)
        now = self.scheduler.now_s = self._clock()
        for seq in self.expiry.due(now):
            self._expire(seq)
        if self.lobby is not None:
            self._leave_lobby(self.lobby)
        step = None if drains else self.scheduler.schedule()
        if step is not None:
            step.launched_s = self._clock()
            self.executor.forward(step.plan)
        deltas = self._collect() if self._overlaps else []
        if step is not None:
            self.executor.sample(self._masks(step))
            self._in_flight.append(step)
        if not self._overlaps and (step is None or len(self._in_flight) >= self._most_in_flight):
            deltas = self._collect()
        if self._failed:
            deltas, self._failed = deltas + self._failed, []
        if step is None and not deltas and self.lobby is not None:
            self.lobby.wait(0.01)  # nothing runs; short, because aborts and new requests wait for this call
        return deltas

    def _take_over(self, relief: Relief) -> bool:
        """Go on with the successor, if it is there: what runs is computed anew, for nothing cached is valid there.

        True where a step is in flight, which has to come home first.
        """
        if not relief.ready or self._in_flight:
            return relief.ready
        successor = relief.take()
        self.scheduler.put_back_all()
        self.pages.forget_unused()
        self.executor.close()
        self.executor, self.settings, self.relief = successor.executor, successor.settings, None
        self.pace = self.scheduler.pace = _pace_of(self.settings)
        self.info = self._describe()
        return False

    def _leave_lobby(self, lobby: Lobby) -> None:
        """Sequences whose grammar is there now go to the queue."""
        ready, failed = lobby.leave()
        for seq in ready:
            self._enqueue(seq)
        for seq, message in failed:
            seq.finished = True
            self._forget(seq.id)
            self._failed.append(TokenDelta(seq.id, [], "error", None, message))

    def _collect(self) -> list[TokenDelta]:
        """The oldest step's results, if one is in flight."""
        if not self._in_flight:
            return []
        step = self._in_flight.popleft()
        result = self.executor.collect()
        now = self.scheduler.now_s = self._clock()
        # With overlap a step begins when the one before it is done, not when it was queued.
        self.pace.observe(sum(step.plan.num_tokens), now - max(step.launched_s, self._last_done_s))
        self._last_done_s = now
        deltas = self.scheduler.apply(step, result)
        for delta in deltas:
            if delta.finish_reason is not None:
                self._forget(delta.id)
            elif delta.times is not None:  # the prompt is computed
                for seq in self.siblings.leave(delta.id):
                    self.scheduler.waiting.push(seq)
        return deltas

    def _expire(self, seq: Sequence) -> None:
        """End a sequence whose time is over; one that has not begun can be tried again later."""
        waited = f"after {self.scheduler.now_s - seq.arrived_s:.2f} s"
        reason: FinishReason = "rejected" if seq.admitted_s < 0 else "deadline"
        if reason == "rejected":
            self._num_rejected += 1
        else:
            self._num_deadlines += 1
        self._end(seq)
        message = (
            f"The request had not begun {waited}, and its time was over." if reason == "rejected" else None
        )
        self._failed.append(TokenDelta(seq.id, [], reason, None, message, max(0, seq.num_cached)))

    def _masks(self, step: Step) -> list[GrammarMask]:
        """Masks of the rows under a grammar: one for the next token and one after each draft it would accept."""
        masks = []
        for row, seq in enumerate(step.rows):
            constraint = seq.constraint
            if constraint is None or seq.finished or not step.plan.sample[row]:
                continue
            drafts = seq.drafts[: step.plan.num_drafts[row]]
            try:
                words, penalties = _words(constraint, drafts)
            except GrammarError as error:
                self._failed.append(self.scheduler.fail(seq, str(error), "unsatisfiable"))
                self._forget(seq.id)
                continue
            # Positions behind a forbidden draft are never reached; the runner still expects a mask for each.
            unreached = 1 + step.plan.num_drafts[row] - len(words)
            words += [words[-1]] * unreached
            penalties += [{}] * unreached
            masks.append(GrammarMask(row, b"".join(words), penalties if any(penalties) else []))
        return masks

    # -- everything else ----------------------------------------------------------------------------------------

    def control(self, command: Control) -> ControlReply:
        """Carry out a command. ``Shutdown`` only sets ``stopping``: whoever calls ``step`` ends the loop."""
        if isinstance(command, GetInfo):
            return self.info
        if isinstance(command, GetStats):
            return self.stats()
        if isinstance(command, ResetPrefixCache):
            self.pages.forget_unused()
        elif isinstance(command, CheckPool):
            self.check()
        elif isinstance(command, DropFront):
            self.abort([id for id in self._live if id >> FRONT_SHIFT == command.front])
        elif isinstance(command, Shutdown):
            self.stopping = True
            if not command.drain:
                self.abort(list(self._live))
        return None

    def stats(self) -> EngineStats:
        """Gauges now and counters since the start."""
        counters, pool = self.scheduler.counters, self.pages.pool
        watch = pool.watch
        return EngineStats(
            num_running=self.scheduler.num_running,
            num_waiting=self.num_waiting,
            kv_cache_usage=1 - pool.num_free / pool.num_pages if pool.num_pages else 0.0,
            num_preemptions=counters.num_preemptions,
            prefix_cache_queries=self.pages.num_queries,
            prefix_cache_hits=self.pages.num_hits,
            num_steps=counters.num_steps,
            num_prompt_tokens=counters.num_prompt_tokens,
            num_generation_tokens=counters.num_generation_tokens,
            num_drafts=counters.num_drafts,
            num_draft_tokens=counters.num_draft_tokens,
            num_accepted_tokens=counters.num_accepted_tokens,
            step_tokens=counters.step_tokens,
            num_deferred=self._num_deferred,
            num_rejected=self._num_rejected,
            num_deadlines=self._num_deadlines,
            num_failed=counters.num_failed,
            num_cached_prompt_tokens=counters.num_cached_prompt_tokens,
            num_step_tokens=counters.num_step_tokens,
            accepted_at=counters.accepted_at,
            iteration_tokens=counters.iteration_tokens,
            page_lifetimes=[] if watch is None else watch.lifetimes,
            page_idles=[] if watch is None else watch.idles,
            page_gaps=[] if watch is None else watch.gaps,
        )

    def check(self) -> None:
        """Prove that every page is accounted for; raises ``PoolError`` otherwise."""
        held = [page for seq in self.scheduler.running() for page in seq.table.pages()]
        self.pages.pool.check(held, self.pages.index.pages())

    def close(self) -> None:
        """Abort everything and stop the executor."""
        self.abort(list(self._live))
        self._in_flight.clear()
        if self.relief is not None:
            self.relief.close()
        if self.lobby is not None:
            self.lobby.close()
        self.executor.close()

    def _idle_slots(self) -> int:
        """Requests that the next step lets in do not count against the queue's bound."""
        return max(0, self.info.max_num_seqs - self.scheduler.num_running)


def _pace_of(settings: EngineSettings) -> Pace:
    return Pace(settings.max_step_ms / 1e3, settings.max_num_batched_tokens, settings.free_tokens)


def _words(constraint: Constraint, drafts: list[int]) -> tuple[list[bytes], list[dict[int, float]]]:
    """Masks and penalties of the next token and of the one after each draft, up to the first draft that is forbidden or
    the last."""
    dry = constraint if isinstance(constraint, DryPenalty) else None
    words = [constraint.mask()]
    penalties = [{} if dry is None else dry.penalties()]
    accepted = 0
    for draft in drafts:
        if not constraint.accept(draft):
            break
        accepted += 1
        if constraint.ended:  # what is drawn behind the end is thrown away
            break
        words.append(constraint.mask())
        penalties.append({} if dry is None else dry.penalties())
    constraint.rewind(accepted)
    return words, penalties


def _fitting_length(layout: CacheLayout, num_pages: int, asked: int) -> int:
    """The longest sequence, up to ``asked`` tokens, that has room in an otherwise empty pool."""
    if layout.pages_for(asked) <= num_pages:
        return asked
    low, high = 0, asked
    while low < high:
        middle = (low + high + 1) // 2
        if layout.pages_for(middle) <= num_pages:
            low = middle
        else:
            high = middle - 1
    if low < 2:
        raise OutOfMemoryError(
            f"The KV cache has {num_pages} pages, but a sequence of 2 tokens needs {layout.pages_for(2)}.",
            "Give the cache more memory.",
        )
    return low
