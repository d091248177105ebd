"""A runner that is all bookkeeping and no maths, to catch the scheduler lying.

Every page holds numbers. What a token computes depends on every number it reads through its page tables, and what
it reads decides the next token: a wrong table, a page freed too early, a stale prefix hit, a forgotten zero or a
count that is off by one all change the answer. ``reference`` gives the answer without pages, steps or batches.

One layer a cache group, in order. At position p with input x:
    attention    cell[p] = mix(x, p, group);  x = mix(x, sum of the visible cells)
    recurrent    state = mix(state of p - 1, x);  x = mix(x, state)
The last x, modulo the vocabulary, is the next token (or the first allowed one after it).
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from octavo.engine.cache.layout import CacheGroup, CacheLayout
from octavo.engine.cache.spec import ChunkedKV, FullKV, KVSpec, StateKV, WindowKV
from octavo.engine.core import EngineCore
from octavo.engine.executor.inline import InlineExecutor
from octavo.engine.settings import EngineSettings
from octavo.protocol.generate import GenerateRequest, SamplingParams, Terms
from octavo.protocol.plan import GrammarMask, SlotInit, StepPlan, StepResult, ZeroPage

VOCAB = 23
EOS = 0
MASK = (1 << 61) - 1


def mix(a: int, b: int, c: int = 0) -> int:
    x = (a * 0x9E3779B97F4A7C15 + b * 0xC2B2AE3D27D4EB4F + c * 0x165667B19E3779F9 + 1) & MASK
    return x ^ (x >> 29)


def visible(spec: KVSpec, p: int) -> int:
    """First position that the token at p can see."""
    if isinstance(spec, WindowKV):
        return max(0, p - spec.window + 1)
    if isinstance(spec, ChunkedKV):
        return p // spec.chunk * spec.chunk
    return 0


def pick(x: int, allowed: set[int] | None) -> int:
    token = x % VOCAB
    while allowed is not None and token not in allowed:
        token = (token + 1) % VOCAB
    return token


class Grammar:
    """What is allowed depends on how many tokens were accepted and on the last of them."""

    def __init__(self, most: int = 1 << 30) -> None:
        self.history: list[int] = []
        self.most = most

    @property
    def ended(self) -> bool:
        return len(self.history) >= self.most

    def allowed(self) -> set[int]:
        last = self.history[-1] if self.history else 0
        return {t for t in range(VOCAB) if (t + len(self.history) + last) % 3}

    def accept(self, token: int) -> bool:
        if token not in self.allowed():
            return False
        self.history.append(token)
        return True

    def rewind(self, count: int) -> None:
        if count:
            del self.history[-count:]

    def mask(self) -> bytes:
        return sum(1 << t for t in self.allowed()).to_bytes(4, "little")


@dataclass
class Asked:
    """A request of a scenario and its answer."""

    request: GenerateRequest
    grammar: bool
    fails_at: int | None  # position at which the device reports an error
    abort_at: int | None  # engine step
    submit_at: int
    answer: list[int] = field(default_factory=list)
    reason: str = ""
    got: list[int] = field(default_factory=list)
    got_reason: str | None = None
    most: int = 1 << 30  # tokens after which the grammar allows no more


def reference(asked: Asked, specs: list[KVSpec], max_model_len: int) -> None:
    """Fill in the answer, one token at a time over plain lists."""
    sampling = asked.request.sampling
    tokens = list(asked.request.prompt_token_ids)
    num_prompt = len(tokens)
    sums: list[list[int]] = [[0] for _ in specs]  # running sums of cells
    states = [0] * len(specs)
    grammar = Grammar(asked.most) if asked.grammar else None
    p = 0
    while True:
        x = mix(tokens[p], p)
        for g, spec in enumerate(specs):
            if isinstance(spec, StateKV):
                states[g] = mix(states[g], x)
                x = mix(x, states[g])
            else:
                sums[g].append(sums[g][-1] + mix(x, p, g))
                x = mix(x, sums[g][-1] - sums[g][visible(spec, p)])
        p += 1
        if asked.fails_at is not None and p > asked.fails_at:
            asked.reason = "error"
            return
        if p < len(tokens):
            continue
        allowed = grammar.allowed() if grammar else set(range(VOCAB))
        if len(tokens) - num_prompt < sampling.min_tokens:
            allowed = allowed - {EOS, *sampling.stop_token_ids}
        token = pick(x, allowed)
        tokens.append(token)
        asked.answer.append(token)
        if grammar:
            grammar.accept(token)
            if grammar.ended:
                asked.reason = "stop"
                return
        if token in {EOS, *sampling.stop_token_ids} and len(asked.answer) > sampling.min_tokens:
            asked.reason = "stop"
            return
        if len(asked.answer) == sampling.max_tokens or len(tokens) == max_model_len:
            asked.reason = "length"
            return


@dataclass
class Slot:
    init: SlotInit
    asked: Asked
    tokens: list[int]
    tables: list[dict[int, int]]
    drafts: list[int] = field(default_factory=list)


class SimulatedRunner:
    """Implements ``Runner``; reads and writes nothing but pages and slots."""

    def __init__(
        self,
        layout: CacheLayout,
        *,
        num_pages: int,
        num_slots: int,
        num_drafts: int,
        max_model_len: int,
        rng: random.Random,
    ) -> None:
        self.max_model_len = max_model_len
        self.layout = layout
        self.num_pages = num_pages
        self.num_slots = num_slots
        self.num_drafts = num_drafts
        self.rng = rng
        self.specs = [group.spec for group in layout.groups]
        longest = max((spec.page_size for spec in self.specs), default=1)
        # None: never written; reading it fails loudly. A state page uses cell 0.
        self.memory: list[list[int | None]] = [[None] * longest for _ in range(num_pages)]
        self.slots: dict[int, Slot] = {}
        self.by_seed: dict[int, Asked] = {}
        self.current: tuple[StepPlan, list[tuple[list[int], list[int], bool]]] | None = None
        self.ready: deque[StepResult] = deque()

    def forward(self, plan: StepPlan) -> None:
        for init in plan.admits:
            tables: list[dict[int, int]] = [{} for _ in self.specs]
            self.slots[init.slot] = Slot(init, self.by_seed[init.seed], list(init.token_ids), tables)
        for write in plan.page_writes:
            for i, page in enumerate(write.pages):
                self.slots[write.slot].tables[write.group][write.first + i] = page
        for op in plan.page_ops:
            assert isinstance(op, ZeroPage)
            self.memory[op.page] = [0] * len(self.memory[op.page])
        assert len(set(plan.slots)) == len(plan.slots)
        # Rows of one step must not need each other, so their order is random.
        order = self.rng.sample(range(plan.num_rows), plan.num_rows)
        done = {row: self._row(plan, row) for row in order}
        self.current = (plan, [done[row] for row in range(plan.num_rows)])

    def _row(self, plan: StepPlan, row: int) -> tuple[list[int], list[int], bool]:
        """(x after every sampled position, drafts verified, whether the row failed)."""
        slot, start, n = self.slots[plan.slots[row]], plan.starts[row], plan.num_tokens[row]
        known = len(slot.init.token_ids)
        drafts: list[int] = []
        assert start + n < self.max_model_len
        for spec in self.specs:
            if isinstance(spec, StateKV):
                assert start // spec.page_size == (start + n - 1) // spec.page_size
        if start < known:
            assert start + n <= known, "a row mixes known and drawn tokens"
            assert plan.sample[row] == (start + n == known)
            inputs = slot.init.token_ids[start : start + n]
        else:
            true_start = len(slot.tokens) - 1  # the optimistic start may be ahead
            assert true_start <= start
            assert self.num_drafts or true_start == start
            assert n == 1 + plan.num_drafts[row] and plan.sample[row]
            start = true_start
            drafts = slot.drafts[: plan.num_drafts[row]]
            inputs = [slot.tokens[-1], *drafts]
        fails = slot.asked.fails_at is not None and start + len(inputs) > slot.asked.fails_at
        if fails and drafts and len(slot.tokens) > slot.asked.fails_at:  # decided by the first input alone
            fails = True
        elif fails and drafts:
            # A rejected draft must not fail the request: cut the row to what surely belongs to it.
            inputs, drafts, fails = inputs[:1], [], start + 1 > (slot.asked.fails_at or 0)
        outputs = [self._compute(slot, start + i, token) for i, token in enumerate(inputs)]
        if fails:
            for i in range(len(inputs)):
                self._spoil(slot, start + i)
        return outputs[-1 - len(drafts) :], drafts, fails

    def _compute(self, slot: Slot, p: int, token: int) -> int:
        x = mix(token, p)
        for g, spec in enumerate(self.specs):
            table, size = slot.tables[g], spec.page_size
            if isinstance(spec, StateKV):
                before = self.memory[table[max(0, p - 1) // size]][0]
                assert before is not None
                state = mix(before, x)
                self.memory[table[p // size]][0] = state
                x = mix(x, state)
                continue
            self.memory[table[p // size]][p % size] = mix(x, p, g)
            first, total = visible(spec, p), 0
            for k in range(first // size, p // size + 1):
                cells = self.memory[table[k]][max(0, first - k * size) : min(size, p + 1 - k * size)]
                total += sum(cells)  # type: ignore[arg-type]
            x = mix(x, total)
        return x

    def _spoil(self, slot: Slot, p: int) -> None:
        for g, spec in enumerate(self.specs):
            cell = 0 if isinstance(spec, StateKV) else p % spec.page_size
            self.memory[slot.tables[g][p // spec.page_size]][cell] = self.rng.getrandbits(60)

    def sample(self, masks: list[GrammarMask]) -> None:
        assert self.current is not None
        plan, rows = self.current
        self.current = None
        words = {mask.row: mask.words for mask in masks}
        result = StepResult(plan.step, [], [], draft_tokens=[])
        assert result.draft_tokens is not None
        for row, (outputs, drafts, failed) in enumerate(rows):
            slot = self.slots[plan.slots[row]]
            drawn: list[int] = []
            if failed:
                result.errors = {**(result.errors or {}), row: "NaN"}
            if plan.sample[row]:
                if slot.asked.grammar and row in words:
                    assert len(words[row]) == 4 * (1 + plan.num_drafts[row])
                for i, x in enumerate(outputs):
                    drawn.append(pick(x, self._allowed(slot, words.get(row), i)))
                    slot.tokens.append(drawn[-1])
                    if i >= len(drafts) or drafts[i] != drawn[-1]:
                        break
                slot.drafts = self._draft(slot)
            result.tokens.append(drawn)
            result.num_drafts.append(len(slot.drafts))
            result.draft_tokens.append(slot.drafts)
        if not self.num_drafts:
            result.num_drafts, result.draft_tokens = [], None
        self.ready.append(result)

    def _allowed(self, slot: Slot, words: bytes | None, i: int) -> set[int]:
        allowed = set(range(VOCAB))
        if words is not None:
            bits = int.from_bytes(words[4 * i : 4 * i + 4], "little")
            allowed = {t for t in allowed if bits >> t & 1}
        if len(slot.tokens) - slot.init.num_prompt < slot.init.sampling.min_tokens:
            allowed -= set(slot.init.stop_token_ids)
        return allowed

    def _draft(self, slot: Slot) -> list[int]:
        """Guesses that are mostly right (it knows the answer) and sometimes not."""
        given = len(slot.tokens) - slot.init.num_prompt
        ahead = slot.asked.answer[given : given + self.rng.randint(0, self.num_drafts)]
        return [token if self.rng.random() < 0.8 else self.rng.randrange(VOCAB) for token in ahead]

    def collect(self) -> StepResult:
        return self.ready.popleft()

    def close(self) -> None:
        self.ready.clear()


LAYOUTS: list[list[KVSpec]] = [
    [FullKV(4, 1)],
    [FullKV(1, 1)],
    [FullKV(4, 1), WindowKV(4, 1, 6)],
    [WindowKV(2, 1, 5), FullKV(8, 1)],
    [WindowKV(4, 1, 1)],
    [FullKV(4, 1), ChunkedKV(4, 1, 8)],
    [ChunkedKV(4, 1, 6), WindowKV(2, 1, 3)],
    [FullKV(4, 1), StateKV(8, 1)],
    [StateKV(4, 1)],
    [FullKV(2, 1), WindowKV(4, 1, 7), StateKV(8, 1)],
    [FullKV(4, 1), ChunkedKV(2, 1, 10), WindowKV(8, 1, 9), StateKV(4, 1)],
    [],
]


@dataclass
class Outcome:
    """What a run exercised, so that the test can tell that it exercised anything."""

    steps: int
    tokens: int
    preemptions: int
    hits: int
    accepted: int


def run(seed: int) -> Outcome:
    """One random scenario; raises AssertionError where any answer differs from the reference."""
    rng = random.Random(seed)
    specs = rng.choice(LAYOUTS)
    has_state = any(isinstance(spec, StateKV) for spec in specs)
    layout = CacheLayout(tuple(CacheGroup(spec, (i,)) for i, spec in enumerate(specs)), 1, 1)
    max_model_len = rng.choice([12, 30, 48])
    tight = layout.pages_for(max_model_len)
    num_pages = tight + rng.choice([0, 1, 2, tight // 2, 3 * tight])
    runner = SimulatedRunner(
        layout,
        num_pages=max(num_pages, 1),
        max_model_len=max_model_len,
        num_slots=rng.randint(1, 5),
        num_drafts=0 if has_state else rng.choice([0, 0, 1, 3]),
        rng=rng,
    )
    settings = EngineSettings(
        max_model_len=max_model_len,
        max_num_seqs=5,
        max_num_batched_tokens=rng.choice([1, 3, 8, 20, 64]),
        vocab_size=VOCAB,
        enable_prefix_caching=rng.random() < 0.85,
        scheduling_policy=rng.choice(["fcfs", "priority", "fair"]),
        overlap=rng.random() < 0.6,
        max_concurrent_batches=(1, 1, 2, 3)[seed % 4],
    )
    core = EngineCore(InlineExecutor(runner), settings)
    assert core.info.max_model_len == max_model_len
    rng.shuffle(core.scheduler.resources)  # their order must not matter
    pending = deque(_requests(rng, max_model_len))
    everything = {asked.request.id: asked for asked in pending}
    for asked in everything.values():
        runner.by_seed[asked.request.id] = asked
        reference(asked, specs, max_model_len)
    _drive(core, pending, everything, rng)
    for asked in everything.values():
        if asked.got_reason is None:  # aborted
            assert asked.abort_at is not None
            assert asked.got == asked.answer[: len(asked.got)], (seed, asked)
        else:
            assert (asked.got, asked.got_reason) == (asked.answer, asked.reason), (seed, asked)
    assert core.pages.pool.num_free == core.pages.pool.num_pages
    stats = core.stats()
    return Outcome(
        stats.num_steps,
        stats.num_generation_tokens,
        stats.num_preemptions,
        stats.prefix_cache_hits,
        stats.num_accepted_tokens,
    )


def _requests(rng: random.Random, max_model_len: int) -> list[Asked]:
    bases = [[rng.randint(1, 3) for _ in range(max_model_len)] for _ in range(2)]
    requests, arrival = [], 0
    for id in range(rng.randint(1, 8)):
        arrival += rng.choice([0, 0, 1, 5])
        shared = rng.choice(bases)[: rng.randint(0, max_model_len - 4)]
        prompt = shared + [rng.randrange(1, VOCAB) for _ in range(rng.randint(1, 3))]
        max_tokens = rng.choice([1, 2, 10, 60, None])
        sampling = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=rng.choice([0, 0, 3]) if max_tokens is None or max_tokens > 3 else 0,
            ignore_eos=False,
            stop_token_ids=rng.choice([[], [], [5, 9]]),
            seed=id,
        )
        request = GenerateRequest(
            id=id,
            prompt_token_ids=prompt,
            sampling=sampling,
            eos_token_ids=[EOS],
            priority=rng.randint(0, 2),
            arrival_s=float(arrival),
            cache_salt=rng.choice([None, None, "tenant"]),
            terms=Terms(tenant=rng.choice("abc"), weight=rng.choice([0.5, 1.0, 3.0])),
            leader=rng.choice([None, None, id - 1]),
        )
        requests.append(
            Asked(
                request,
                grammar=rng.random() < 0.4,
                fails_at=rng.randint(0, max_model_len) if rng.random() < 0.1 else None,
                abort_at=rng.randint(0, 40) if rng.random() < 0.2 else None,
                submit_at=arrival,
                most=rng.choice([1 << 30, 1 << 30, rng.randint(1, 12)]),
            )
        )
    return requests


def _drive(core: EngineCore, pending: deque[Asked], everything: dict[int, Asked], rng: random.Random) -> None:
    """Submit, step and abort until nothing is left; every invariant after every step."""
    for step in range(5000):
        while pending and pending[0].submit_at <= step:
            asked = pending.popleft()
            core.submit(asked.request, Grammar(asked.most) if asked.grammar else None)
        if not pending and not core.has_work:
            return
        for asked in everything.values():
            if asked.abort_at == step and asked not in pending:
                core.abort([asked.request.id])
        if rng.random() < 0.1:
            core.scheduler.max_num_batched_tokens = rng.choice([1, 2, 7, 30])
        budget = core.scheduler.max_num_batched_tokens
        steps_before = core.scheduler.counters.num_steps
        for delta in core.step():
            asked = everything[delta.id]
            assert asked.got_reason is None
            asked.got += delta.tokens
            asked.got_reason = delta.finish_reason
        if core.scheduler.counters.num_steps > steps_before:
            assert 0 < core.scheduler.counters.step_tokens <= budget
        core.check()
        for seq in core.scheduler.running():
            for held in seq.table.groups:
                live = held.spec.live(seq.num_computed)
                assert not live or (held.first <= live.start and live.stop <= held.first + len(held.pages))
    raise AssertionError("the engine does not come to an end")
