"""The engine's rules one by one (the simulation has them all at once)."""

from __future__ import annotations

from typing import Any

import pytest
from engines import VOCAB, expected, null_core, request
from simulation import Grammar

from octavo.config import EngineOptions, Hardware, ModelLimits, resolve
from octavo.engine.cache.layout import CacheGroup, CacheLayout
from octavo.engine.cache.pool import PoolError
from octavo.engine.cache.spec import FullKV, KVSpec, StateKV, WindowKV
from octavo.engine.core import EngineCore
from octavo.engine.executor.inline import InlineExecutor
from octavo.engine.executor.null import NullRunner
from octavo.engine.settings import EngineSettings
from octavo.errors import OutOfMemoryError, QueueFullError, RequestError, UsageError
from octavo.protocol.control import CheckPool, GetInfo, GetStats, ResetPrefixCache, Shutdown
from octavo.protocol.generate import GenerateRequest, Logprob, SamplingParams, TokenDelta
from octavo.protocol.plan import CopyPage, GrammarMask, StepPlan, StepResult


class Recorder(NullRunner):
    """A null runner that keeps every plan and every mask, and can add to results."""

    def __init__(self, specs: list[KVSpec], *, num_pages: int, num_slots: int, **options: Any) -> None:
        layout = CacheLayout(tuple(CacheGroup(spec, (i,)) for i, spec in enumerate(specs)), 1, 1)
        super().__init__(layout, num_pages=num_pages, num_slots=num_slots, vocab_size=VOCAB, **options)
        self.plans: list[StepPlan] = []
        self.masks: list[list[GrammarMask]] = []
        self.changes: dict[int, dict[str, Any]] = {}

    def forward(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        super().forward(plan)

    def sample(self, masks: list[GrammarMask]) -> None:
        self.masks.append(masks)
        super().sample(masks)

    def collect(self) -> StepResult:
        result = super().collect()
        for name, value in self.changes.get(result.step, {}).items():
            setattr(result, name, value)
        return result


def make(
    specs: list[KVSpec] | None = None,
    *,
    num_pages: int = 64,
    num_slots: int = 8,
    runner_options: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[EngineCore, Recorder]:
    runner = Recorder(
        [FullKV(4, 1)] if specs is None else specs,
        num_pages=num_pages,
        num_slots=num_slots,
        **(runner_options or {}),
    )
    facts: dict[str, Any] = {
        "max_model_len": 64,
        "max_num_seqs": num_slots,
        "max_num_batched_tokens": 16,
        "vocab_size": VOCAB,
    }
    return EngineCore(InlineExecutor(runner), EngineSettings(**{**facts, **changes})), runner


def drain(core: EngineCore) -> dict[int, list[TokenDelta]]:
    deltas: dict[int, list[TokenDelta]] = {}
    for _ in range(2000):
        if not core.has_work:
            return deltas
        for delta in core.step():
            deltas.setdefault(delta.id, []).append(delta)
        core.check()
    raise AssertionError("no end")


def tokens_of(deltas: list[TokenDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.tokens]


def test_a_prompt_is_chunked_to_the_budget_and_decodes_come_first() -> None:
    core, runner = make(max_num_batched_tokens=10)
    core.submit(request(1, prompt=[1] * 4, max_tokens=5))
    core.step()
    core.submit(request(2, prompt=[2] * 25, max_tokens=2))
    drain(core)
    rows = [list(zip(p.slots, p.starts, p.num_tokens, p.sample)) for p in runner.plans]
    assert rows[0] == [(0, 0, 4, True)]
    assert rows[1] == [(0, 4, 1, True), (1, 0, 9, False)]
    assert rows[2] == [(0, 5, 1, True), (1, 9, 9, False)]
    assert rows[3] == [(0, 6, 1, True), (1, 18, 7, True)]
    assert rows[4] == [(0, 7, 1, True), (1, 25, 1, True)]
    assert len(rows) == 5


def test_overlap_plans_the_next_step_before_the_last_one_is_known() -> None:
    core, runner = make(overlap=True)
    core.submit(request(1, prompt=[1] * 4, max_tokens=3))
    assert core.step() == []
    assert runner.plans[-1].starts == [0]
    assert tokens_of(core.step()) == expected(request(1, prompt=[1] * 4))[:1]
    assert runner.plans[-1].starts == [4]
    core.step()
    assert runner.plans[-1].starts == [5]
    last = core.step()  # the third token ends it, which was known beforehand: no wasted row
    assert last[0].finish_reason == "length"
    assert len(runner.plans) == 3
    assert not core.has_work


def test_a_row_in_flight_of_a_stopped_sequence_is_ignored() -> None:
    stop = expected(request(1, prompt=[1] * 4))[0]
    core, runner = make(overlap=True)
    core.submit(request(1, prompt=[1] * 4, max_tokens=30, stop_token_ids=[stop]))
    deltas = drain(core)[1]
    assert tokens_of(deltas) == [stop]
    assert (deltas[-1].finish_reason, deltas[-1].stop_token) == ("stop", stop)
    assert len(runner.plans) == 2  # one wasted row
    assert core.pages.pool.num_free == 64


@pytest.mark.parametrize("overlap", [False, True])
def test_two_that_fit_only_alone_take_turns(overlap: bool) -> None:
    """A pool one page larger than the longest sequence: nothing may hang, answers do not change."""
    core, _ = make(num_pages=17, num_slots=4, overlap=overlap)
    requests = [request(i, prompt=[1 + i] * 20, max_tokens=44) for i in range(4)]
    for req in requests:
        core.submit(req)
    deltas = drain(core)
    for req in requests:
        assert tokens_of(deltas[req.id]) == expected(req)
    assert core.stats().num_preemptions > 0


def test_the_latest_is_preempted_and_not_let_in_again_at_once() -> None:
    core, runner = make(num_pages=8, max_model_len=30, enable_prefix_caching=False)
    for i in range(2):
        core.submit(request(i, prompt=[1 + i] * 14, max_tokens=10))
    for _ in range(20):
        core.step()
        if core.stats().num_preemptions:
            break
    assert core.stats().num_preemptions == 1
    assert [seq.id for seq in core.scheduler.running()] == [0]
    assert [seq.id for seq in core.scheduler.waiting] == [1]
    assert runner.plans[-1].admits == []
    known = core.scheduler.waiting.peek()
    assert known is not None and len(known.tokens) > 14  # what it had drawn is kept
    deltas = drain(core)
    back = [init for plan in runner.plans for init in plan.admits if init.seed == 1][-1]
    assert back.num_prompt == 14 and len(back.token_ids) > 14
    assert tokens_of(deltas[0])[-1] == expected(request(0, prompt=[1] * 14, max_tokens=10))[-1]


def test_a_long_prompt_waits_until_all_of_it_fits() -> None:
    """Let in with the few free pages there are, it would only be preempted over and over."""
    core, runner = make(num_pages=12, max_num_batched_tokens=8, max_model_len=48)
    core.submit(request(1, prompt=[1] * 16, max_tokens=12))
    core.submit(request(2, prompt=[2] * 40, max_tokens=1))
    core.submit(request(3, prompt=[3], max_tokens=1))
    deltas = drain(core)
    assert core.stats().num_preemptions == 0
    assert [init.seed for plan in runner.plans for init in plan.admits] == [1, 2, 3]  # and nobody overtakes
    assert tokens_of(deltas[1]) == expected(request(1, prompt=[1] * 16, max_tokens=12))


def test_priority_decides_who_runs_and_who_yields() -> None:
    core, _ = make(num_slots=1, scheduling_policy="priority")
    for id, priority in [(1, 5), (2, 0), (3, -1), (4, 0)]:
        core.submit(
            GenerateRequest(
                id=id, prompt_token_ids=[id], sampling=SamplingParams(max_tokens=2), priority=priority
            )
        )
    order = [delta.id for _ in range(20) for delta in core.step() if delta.finish_reason]
    assert order == [3, 2, 4, 1]


def test_what_can_never_fit_is_refused_and_the_length_says_so() -> None:
    core, _ = make(num_pages=5)  # 20 tokens
    assert core.info.max_model_len == 20
    with pytest.raises(
        RequestError, match=r"20 tokens for prompt and answer \(KV cache: 5 pages\)"
    ) as caught:
        core.submit(request(1, prompt=[1] * 20))
    assert caught.value.param == "prompt"
    core.submit(request(2, prompt=[1] * 19, max_tokens=100))
    deltas = drain(core)[2]
    assert len(tokens_of(deltas)) == 1
    assert deltas[-1].finish_reason == "length"
    with pytest.raises(OutOfMemoryError, match="1 pages"):
        make([FullKV(1, 1)], num_pages=1)


def test_the_queue_is_bounded_beyond_what_the_next_step_lets_in() -> None:
    core, _ = make(num_slots=2, max_queue_len=3)
    for i in range(5):
        core.submit(request(i))
    with pytest.raises(QueueFullError):
        core.submit(request(5))
    core.abort([4])
    core.submit(request(6))
    with pytest.raises(RequestError, match="already running"):
        core.submit(request(6))
    assert set(drain(core)) == {0, 1, 2, 3, 6}


@pytest.mark.parametrize("overlap", [False, True])
def test_abort_at_any_step_frees_everything(overlap: bool) -> None:
    for when in range(8):
        core, _ = make(max_num_batched_tokens=8, overlap=overlap)
        core.submit(request(1, prompt=[1] * 30, max_tokens=20))
        for _ in range(when):
            core.step()
        core.abort([1, 2])
        assert drain(core) == {}
        assert core.pages.pool.num_free == 64
        assert core.stats().num_running == core.stats().num_waiting == 0


@pytest.mark.parametrize("specs", [[FullKV(4, 1)], [FullKV(4, 1), WindowKV(4, 1, 9)], [StateKV(8, 1)]])
def test_a_repeated_prompt_computes_only_its_end(specs: list[KVSpec]) -> None:
    core, runner = make(specs, max_num_batched_tokens=64)
    prompt = list(range(1, 34))
    core.submit(request(1, prompt=prompt, max_tokens=1))
    assert drain(core)[1][0].num_cached_tokens == 0
    core.submit(request(2, prompt=prompt, max_tokens=1))
    assert drain(core)[2][0].num_cached_tokens == 32
    assert (runner.plans[-1].starts, runner.plans[-1].num_tokens) == ([32], [1])
    core.submit(request(3, prompt=prompt[:32], max_tokens=1))  # a hit never covers the last token
    align = core.pages.index.align
    assert drain(core)[3][0].num_cached_tokens == 32 - align
    stats = core.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (33 + 33 + 32, 64 - align)
    assert core.control(ResetPrefixCache()) is None
    core.check()
    core.submit(request(4, prompt=prompt, max_tokens=1))
    assert drain(core)[4][0].num_cached_tokens == 0


def test_the_answer_is_cached_too_and_salts_keep_apart() -> None:
    core, _ = make(max_num_batched_tokens=64)
    core.submit(request(1, prompt=[1] * 8, max_tokens=9))
    answer = tokens_of(drain(core)[1])
    follow_up = [1] * 8 + answer + [5]
    core.submit(request(2, prompt=follow_up, max_tokens=1))
    assert drain(core)[2][0].num_cached_tokens == 16
    salted = request(3, prompt=follow_up, max_tokens=1)
    salted.cache_salt = "tenant"
    core.submit(salted)
    assert drain(core)[3][0].num_cached_tokens == 0
    scored = request(4, prompt=follow_up, max_tokens=1, prompt_logprobs=1)
    core.submit(scored)  # needs every prompt position computed
    assert drain(core)[4][0].num_cached_tokens == 0


def test_a_failed_row_ends_only_its_request_and_poisons_nobody() -> None:
    core, runner = make(max_num_batched_tokens=64)
    runner.changes[1] = {"errors": {0: "NaN in layer 3"}}
    core.submit(request(1, prompt=[1] * 9, max_tokens=5))
    core.submit(request(2, prompt=[2] * 9, max_tokens=5))
    deltas = drain(core)
    assert (deltas[1][-1].finish_reason, deltas[1][-1].error) == ("error", "NaN in layer 3")
    assert tokens_of(deltas[2]) == expected(request(2, prompt=[2] * 9, max_tokens=5))
    core.submit(request(3, prompt=[1] * 9, max_tokens=1))
    assert drain(core)[3][0].num_cached_tokens == 0  # its pages are not trusted
    core.submit(request(4, prompt=[2] * 9, max_tokens=1))
    assert drain(core)[4][0].num_cached_tokens == 8


def test_a_runner_that_draws_nothing_fails_the_request() -> None:
    core, runner = make()
    runner.changes[0] = {"tokens": [[]]}
    core.submit(request(1))
    assert drain(core)[1][-1].finish_reason == "error"


def test_logprobs_travel_with_their_tokens() -> None:
    core, runner = make(max_num_batched_tokens=4)
    one = [Logprob(1, -0.5, 1)]
    runner.changes[0] = {"prompt_logprobs": [[one] * 4]}
    runner.changes[1] = {"prompt_logprobs": [[one] * 1], "logprobs": [[one]]}
    core.submit(request(1, prompt=[1] * 6, max_tokens=2, logprobs=0, prompt_logprobs=0))
    first, second = drain(core)[1]
    assert first.prompt_logprobs == [one] * 5
    assert first.logprobs == [one]
    assert second.prompt_logprobs is None


class Scoring(Recorder):
    """Reports as prompt log probabilities the position of each prompt token but the first."""

    def collect(self) -> StepResult:
        result = super().collect()
        plan = self.plans[result.step]
        result.prompt_logprobs = []
        for slot, start, n in zip(plan.slots, plan.starts, plan.num_tokens):
            last = min(start + n, self.num_prompt[plan.step][slot] - 1)
            result.prompt_logprobs.append([[Logprob(p + 1, -1.0, 1)] for p in range(start, last)])
        return result

    def forward(self, plan: StepPlan) -> None:
        super().forward(plan)
        prompts = {slot: init.num_prompt for slot, init in self._slots.items()}
        self.num_prompt: dict[int, dict[int, int]] = {**getattr(self, "num_prompt", {}), plan.step: prompts}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("budget", [4, 7, 64])
def test_prompt_logprobs_come_once_even_after_a_preemption(overlap: bool, budget: int) -> None:
    preemptions = 0
    for num_pages in range(10, 16):
        runner = Scoring([FullKV(4, 1)], num_pages=num_pages, num_slots=4)
        settings = EngineSettings(
            max_model_len=36,
            max_num_seqs=4,
            max_num_batched_tokens=budget,
            vocab_size=VOCAB,
            overlap=overlap,
        )
        core = EngineCore(InlineExecutor(runner), settings)
        requests = [request(i, prompt=[1] * 14, max_tokens=20, prompt_logprobs=0) for i in range(3)]
        for req in requests:
            core.submit(req)
        for deltas in drain(core).values():
            told = [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None]
            assert told == [[[Logprob(p, -1.0, 1)] for p in range(1, 14)]]
            assert deltas[0].prompt_logprobs is not None
        preemptions += core.stats().num_preemptions
    assert preemptions > 3


def test_masks_follow_the_grammar_and_drafts_need_to_be_seen() -> None:
    core, runner = make(runner_options={"num_drafts": 2, "script": lambda init, position: position % 5})
    grammar = Grammar()
    core.submit(request(1, prompt=[1] * 3, max_tokens=6), grammar)
    drain(core)
    # The null runner reports counts of drafts but not their tokens: a grammar then runs without drafts.
    assert all(plan.num_drafts == [0] for plan in runner.plans)
    assert all(len(masks) == 1 for masks in runner.masks)
    fresh = Grammar()
    assert runner.masks[0][0].words == fresh.mask()


def test_state_rows_end_at_checkpoints_and_new_states_are_cleared() -> None:
    core, runner = make([StateKV(8, 1)], max_num_batched_tokens=64)
    core.submit(request(1, prompt=[1] * 21, max_tokens=5))
    drain(core)
    for plan in runner.plans:
        for start, n in zip(plan.starts, plan.num_tokens):
            assert start // 8 == (start + n - 1) // 8
    zeroed = [op for plan in runner.plans for op in plan.page_ops]
    assert len(zeroed) == 1
    assert not isinstance(zeroed[0], CopyPage)


def test_windows_hold_no_more_than_they_need() -> None:
    core, _ = make([WindowKV(4, 1, 5)], num_pages=4, max_num_batched_tokens=4)
    assert core.info.max_model_len == 64
    core.submit(request(1, prompt=[1] * 40, max_tokens=20))
    most = 0
    while core.has_work:
        core.step()
        core.check()
        most = max([most, *(len(list(seq.table.pages())) for seq in core.scheduler.running())])
    assert most <= 3


def test_the_budget_may_change_between_steps() -> None:
    core, runner = make()
    core.submit(request(1, prompt=[1] * 30, max_tokens=1))
    core.step()
    core.scheduler.max_num_batched_tokens = 3
    core.step()
    assert [plan.num_tokens for plan in runner.plans] == [[16], [3]]


def test_a_budget_below_the_number_of_sequences_starves_nobody() -> None:
    core, _ = make(max_num_batched_tokens=16)
    requests = [request(i, max_tokens=10) for i in range(8)]
    for req in requests:
        core.submit(req)
    while len(core.scheduler.decoding) < 8:
        core.step()
    core.scheduler.max_num_batched_tokens = 3
    for _ in range(8):
        core.step()
    given = [len(seq.tokens) - seq.num_prompt for seq in core.scheduler.running()]
    assert len(given) == 8
    assert max(given) - min(given) <= 2
    assert {id: tokens_of(deltas)[-1] for id, deltas in drain(core).items()} == {
        req.id: expected(req)[-1] for req in requests
    }


def test_seeds_come_from_the_request_or_the_engine() -> None:
    first, second = make(seed=1), make(seed=1)
    for core, _ in (first, second):
        core.submit(GenerateRequest(id=1, prompt_token_ids=[1], sampling=SamplingParams()))
        core.submit(GenerateRequest(id=2, prompt_token_ids=[1], sampling=SamplingParams(seed=-5)))
        core.step()
    inits = [runner.plans[0].admits for _, runner in (first, second)]
    assert inits[0] == inits[1]
    assert inits[0][1].seed == -5
    assert make(seed=2)[0]._seeds.getrandbits(63) != inits[0][0].seed


def test_control() -> None:
    core, _ = make()
    assert core.control(GetInfo()) is core.info
    assert core.control(GetStats()) == core.stats()
    core.submit(request(1, prompt=[1] * 8))
    core.step()
    assert core.control(CheckPool()) is None
    assert core.stats().kv_cache_usage == 2 / 64
    core.pages.pool._ref[0] += 1
    with pytest.raises(PoolError):
        core.control(CheckPool())
    core.pages.pool._ref[0] -= 1
    core.control(Shutdown(drain=True))
    assert core.stopping and core.has_work
    core.control(Shutdown())
    assert not core.has_work
    core.close()


def test_settings_come_from_resolved_options_and_are_checked() -> None:
    hardware = Hardware("cpu", "x", 1 << 34, 2, True)
    resolved = resolve(EngineOptions.of(max_num_seqs=3, seed=9), hardware, ModelLimits(128, "float32", False))
    settings = EngineSettings.of(resolved, vocab_size=10, model="m")
    assert (settings.max_num_seqs, settings.seed, settings.max_model_len) == (3, 9, 128)
    with pytest.raises(UsageError, match="vocab_size"):
        EngineSettings.of(resolved, vocab_size=0)
    core = null_core(max_num_seqs=3)
    assert core.info.max_num_seqs == 3
    core.close()


def test_in_a_pipeline_steps_of_different_sequences_are_under_way() -> None:
    """Each step begins before the one before it has been read, and takes a share of the sequences that decode; chunks of
    one prompt may follow each other at once."""
    calls: list[str] = []

    class Pipe(Recorder):
        def forward(self, plan: StepPlan) -> None:
            calls.append("forward")
            super().forward(plan)

        def collect(self) -> StepResult:
            calls.append("collect")
            return super().collect()

    runner = Pipe([FullKV(4, 1)], num_pages=64, num_slots=8)
    settings = EngineSettings(
        max_model_len=64,
        max_num_seqs=8,
        max_num_batched_tokens=16,
        vocab_size=VOCAB,
        max_concurrent_batches=2,
    )
    core = EngineCore(InlineExecutor(runner), settings)
    requests = [request(0, prompt=[1] * 40, max_tokens=6), *(request(i, max_tokens=6) for i in range(1, 6))]
    for each in requests:
        core.submit(each)
    answers: dict[int, list[int]] = {each.id: [] for each in requests}
    while core.has_work:
        for delta in core.step():
            answers[delta.id] += delta.tokens
    assert answers == {each.id: expected(each) for each in requests}
    assert calls[:5] == ["forward", "forward", "collect", "forward", "collect"]
    assert [plan.num_tokens[0] for plan in runner.plans[:3]] == [
        16,
        16,
        8,
    ]  # the long prompt, chunk after chunk
    for one, two in zip(runner.plans, runner.plans[1:]):
        drawing = {slot for slot, sample in zip(one.slots, one.sample) if sample}
        assert not drawing & set(two.slots)
    assert any(plan.num_rows == 3 and set(plan.num_tokens) == {1} for plan in runner.plans)
