"""Fair scheduling: who is served least goes first, and nobody keeps all places."""

from __future__ import annotations

import random
from typing import Any

import pytest
from engines import null_core

from octavo.engine.cache.layout import CacheLayout
from octavo.engine.cache.table import PageTable
from octavo.engine.core import EngineCore
from octavo.engine.scheduler.queue import LATELY, MAX_IDLE_TENANTS, FairQueue
from octavo.engine.scheduler.sequence import Sequence
from octavo.protocol.generate import GenerateRequest, SamplingParams, Terms


def request(
    id: int, tenant: str, *, weight: float = 1.0, prompt: int = 8, **sampling: Any
) -> GenerateRequest:
    return GenerateRequest(
        id=id,
        prompt_token_ids=[(id * 31 + i) % 1000 for i in range(prompt)],
        sampling=SamplingParams(**{"max_tokens": 8, "seed": id, **sampling}),
        terms=Terms(tenant=tenant, weight=weight),
    )


def sequence(id: int, tenant: str, weight: float = 1.0) -> Sequence:
    table = PageTable(CacheLayout((), 0, 0))
    return Sequence(request(id, tenant, weight=weight), key=(id,), max_model_len=64, seed=0, table=table)


def test_the_least_served_goes_first_and_arrival_decides_between_its_own() -> None:
    queue = FairQueue(credit=0)
    for id, tenant in enumerate("aaabb"):
        queue.push(sequence(id, tenant))
    order = []
    while len(queue):
        seq = queue.pop()
        order.append(seq.id)
        queue.charge(seq, 10)
    assert order == [0, 3, 1, 4, 2]


def test_weights_divide_the_charge() -> None:
    queue = FairQueue(credit=0)
    for id in range(60):
        queue.push(sequence(id, "ab"[id % 2], weight=(2.0, 1.0)[id % 2]))
    first = []
    for _ in range(30):
        seq = queue.pop()
        queue.charge(seq, 10)
        queue.leave(seq)
        first.append(seq.tenant)
    assert first.count("a") == 20


@pytest.mark.parametrize(("credit", "ahead"), [(0, 1), (20, 2), (30, 3), (1000, 4)])
def test_a_pause_saves_up_no_more_than_the_credit(credit: int, ahead: int) -> None:
    queue = FairQueue(credit)
    busy = sequence(0, "busy")
    queue.push(busy)
    queue.pop()
    queue.charge(busy, 1000)
    for id in range(1, 5):
        queue.push(sequence(id, "busy"))
    for id in range(5, 9):
        queue.push(sequence(id, "late"))
    order = []
    while len(queue):
        seq = queue.pop()
        order.append(seq.tenant)
        queue.charge(seq, 10)
    assert order.index("busy") == ahead, order


def test_removed_and_returned_sequences_are_counted() -> None:
    rng, queue = random.Random(5), FairQueue()
    waiting: list[Sequence] = []
    running: list[Sequence] = []
    for id in range(2000):
        choice = rng.random()
        if choice < 0.5:
            seq = sequence(id, rng.choice("abcd"))
            queue.push(seq)
            waiting.append(seq)
        elif choice < 0.7 and waiting:
            seq = queue.pop()
            waiting.remove(seq)
            running.append(seq)
            queue.charge(seq, rng.randint(1, 50))
        elif choice < 0.85 and waiting:
            seq = waiting.pop(rng.randrange(len(waiting)))
            queue.remove(seq)
        elif running:
            seq = running.pop(rng.randrange(len(running)))
            queue.leave(seq)
            if rng.random() < 0.5:
                queue.push(seq)
                waiting.append(seq)
        assert len(queue) == len(waiting)
        assert {s.id for s in queue} == {s.id for s in waiting}
        assert queue.num_tokens == sum(len(s.tokens) for s in waiting)
    for name, tenant in queue._tenants.items():
        assert tenant.num_running == sum(seq.tenant == name for seq in running)
    assert set(queue._tenants) == {seq.tenant for seq in running + waiting}


def test_many_tenants_are_forgotten() -> None:
    queue = FairQueue()
    for id in range(3 * MAX_IDLE_TENANTS):
        queue.push(sequence(id, f"tenant-{id}"))
        queue.leave(queue.pop())
    assert not queue._tenants and len(queue._idle) == MAX_IDLE_TENANTS


def test_a_flood_yields_to_who_is_here_or_was_lately() -> None:
    queue = FairQueue(credit=40)
    for id in range(4):
        queue.push(sequence(id, "flood"))  # 8 tokens each
    flood = queue.pop()
    queue.charge(flood, 100)
    assert not queue.yields(flood, most=16), "there is nobody else"
    quiet = sequence(9, "quiet")
    queue.push(quiet)
    assert queue.yields(flood, most=16) and not queue.yields(quiet, most=1)
    assert not queue.yields(flood, most=40), "what is left fits into a step"
    assert queue.pop() is quiet
    queue.charge(quiet, 8)
    queue.leave(quiet)
    assert queue.yields(flood, most=16), "it may come back"
    queue.charge(flood, LATELY)
    assert not queue.yields(flood, most=16), "it was too long ago"


def test_who_was_about_even_is_not_waited_for() -> None:
    queue = FairQueue(credit=40)
    mine, other, later = sequence(0, "a"), sequence(1, "b"), sequence(2, "a")
    for seq in (mine, other, later):
        queue.push(seq)
    queue.take(mine)
    queue.take(other)
    queue.charge(mine, 10)
    queue.charge(other, 45)  # it began a credit below
    assert not queue.yields(mine, most=1)
    queue.leave(other)
    queue.charge(mine, 1000)
    assert not queue.yields(mine, most=1), "when it left both had about the same"


def test_answers_wait_one_step_for_a_prompt_that_then_ends_a_step_earlier() -> None:
    core = null_core(scheduling_policy="fair", num_pages=256, num_slots=8, max_num_batched_tokens=16)
    for id in range(1, 5):
        core.submit(request(id, "busy", prompt=4, max_tokens=60))
    for _ in range(3):
        assert len(core.step()) == 4
    core.submit(request(10, "new", prompt=14, max_tokens=1))
    core.submit(request(11, "new", prompt=14, max_tokens=1))
    told = [{delta.id for delta in core.step()} for _ in range(4)]
    assert 10 in told[0] and len(told[0]) == 3, "two answers still fit beside the prompt"
    assert told[1] >= {1, 2, 3, 4}, "answers never wait twice in a row"
    assert 11 in told[1] | told[2]
    run_to_the_end(core)


def run_to_the_end(core: EngineCore) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for _ in range(10_000):
        if not core.has_work:
            return found
        for delta in core.step():
            assert delta.error is None
            found.setdefault(delta.id, []).extend(delta.tokens)
        core.check()
    raise AssertionError("the engine does not come to an end")


@pytest.mark.parametrize("overlap", [False, True])
def test_a_flood_gives_places_back_and_loses_nothing(overlap: bool) -> None:
    core = null_core(scheduling_policy="fair", overlap=overlap, num_pages=256, num_slots=4)
    for id in range(1, 40):
        core.submit(request(id, "flood", max_tokens=30))
    for _ in range(3):
        core.step()
    assert core.scheduler.num_running == 4
    core.submit(request(100, "quiet", max_tokens=4))
    core.submit(request(101, "quiet", max_tokens=4))
    core.submit(request(102, "quiet", max_tokens=4))
    core.step()
    core.step()
    tenants = [seq.tenant for seq in core.scheduler.running()]
    assert tenants.count("quiet") == 2 == tenants.count("flood")  # its share of the places, and no more
    assert core.stats().num_preemptions == 2
    found = run_to_the_end(core)
    alone = null_core(num_pages=256, num_slots=4)
    alone.submit(request(1, "x", max_tokens=30))
    assert len(found) == 42 and found[1][-20:] == run_to_the_end(alone)[1][-20:]


def test_a_long_prompt_of_another_does_not_block() -> None:
    core = null_core(scheduling_policy="fair", num_pages=256, max_num_batched_tokens=16)
    core.submit(request(1, "long", prompt=200))
    core.step()
    core.submit(request(2, "short", prompt=8, max_tokens=1))
    assert [delta.id for delta in core.step()] == [2]
    run_to_the_end(core)


def test_one_tenant_under_fair_is_fcfs() -> None:
    fair, plain = (
        null_core(scheduling_policy=policy, num_pages=24, num_slots=4) for policy in ("fair", "fcfs")
    )
    for core in (fair, plain):
        for id in range(30):
            core.submit(request(id, "", prompt=8 + id % 20, max_tokens=5 + id % 7))
    while fair.has_work or plain.has_work:
        assert [(d.id, d.tokens) for d in fair.step()] == [(d.id, d.tokens) for d in plain.step()]
