"""The waiting line against a sorted list, and when tokens end a sequence."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.cache.layout import CacheLayout
from octavo.engine.cache.table import PageTable
from octavo.engine.scheduler import stop
from octavo.engine.scheduler.queue import Queue, order_key
from octavo.engine.scheduler.sequence import Sequence
from octavo.errors import UsageError
from octavo.protocol.generate import GenerateRequest, SamplingParams
from octavo.protocol.generate import RepetitionDetectionParams as R

EOS = 0


def sequence(
    id: int = 1, *, priority: int = 0, policy: str = "fcfs", arrival_s: float = 0.0, **sampling: Any
) -> Sequence:
    request = GenerateRequest(
        id=id,
        prompt_token_ids=[1, 2, 3],
        sampling=SamplingParams(**sampling),
        eos_token_ids=[EOS],
        priority=priority,
        arrival_s=arrival_s,
    )
    key = order_key(policy, request, id)
    return Sequence(request, key=key, max_model_len=20, seed=0, table=PageTable(CacheLayout((), 0, 0)))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["fcfs", "priority"]), st.randoms(use_true_random=False))
def test_queue_equals_a_sorted_list(policy: str, rng: random.Random) -> None:
    queue, model = Queue(), []
    popped: list[Sequence] = []
    for id in range(300):
        choice = rng.random()
        if choice < 0.5 or not model:
            back = popped.pop() if popped and rng.random() < 0.3 else None  # preempted: keeps its key
            seq = back or sequence(
                id, policy=policy, priority=rng.randint(-2, 2), arrival_s=rng.randint(0, 3)
            )
            queue.push(seq)
            model.append(seq)
        elif choice < 0.8:
            first = min(model, key=lambda seq: seq.key)
            assert queue.peek() is first
            assert queue.pop() is first
            model.remove(first)
            popped.append(first)
        else:
            gone = rng.choice(model)
            queue.remove(gone)
            model.remove(gone)
        assert len(queue) == len(model)
        assert {seq.id for seq in queue} == {seq.id for seq in model}
        assert len(queue._heap) <= max(65, 4 * len(model) + 64)


def test_an_empty_queue() -> None:
    queue = Queue()
    assert queue.peek() is None
    with pytest.raises(IndexError):
        queue.pop()


def test_keys() -> None:
    request = GenerateRequest(
        id=1, prompt_token_ids=[1], sampling=SamplingParams(), priority=5, arrival_s=2.0
    )
    assert order_key("fcfs", request, 7) == (7,)
    assert order_key("priority", request, 7) == (5, 2.0, 7)
    with pytest.raises(UsageError, match="fair"):
        order_key("lottery", request, 7)


@pytest.mark.parametrize(
    ("sampling", "drawn", "expected"),
    [
        ({}, [5, 6], ([5, 6], None, None)),
        ({}, [5, EOS, 6], ([5, EOS], "stop", EOS)),
        ({"ignore_eos": True}, [5, EOS, 6], ([5, EOS, 6], None, None)),
        ({"stop_token_ids": [6]}, [5, 6, 7], ([5, 6], "stop", 6)),
        ({"stop_token_ids": [6], "ignore_eos": True}, [EOS, 6], ([EOS, 6], "stop", 6)),
        ({"max_tokens": 2}, [5, 6, 7], ([5, 6], "length", None)),
        ({"max_tokens": 2}, [5, EOS], ([5, EOS], "stop", EOS)),  # a stop counts before the length
        ({"min_tokens": 2, "max_tokens": 9}, [EOS, EOS, EOS], ([EOS, EOS, EOS], "stop", EOS)),
        ({"min_tokens": 3, "max_tokens": 3}, [EOS, EOS, EOS], ([EOS, EOS, EOS], "length", None)),
        (
            {"repetition_detection": R(max_pattern_size=2)},
            [5, 6, 5, 6, 7],
            ([5, 6, 5, 6], "repetition", None),
        ),
        (
            {"repetition_detection": R(max_pattern_size=1)},
            [5, 6, 5, 6, 6],
            ([5, 6, 5, 6, 6], "repetition", None),
        ),
        ({"repetition_detection": R(max_pattern_size=2, min_count=3)}, [6, 6, 7], ([6, 6, 7], None, None)),
        (
            {"repetition_detection": R(max_pattern_size=3, min_pattern_size=2)},
            [6, 6, 6],
            ([6, 6, 6], None, None),
        ),
        ({"repetition_detection": R()}, [6, 6, 6], ([6, 6, 6], None, None)),
        ({"repetition_detection": R(max_pattern_size=1)}, [3, 4], ([3, 4], None, None)),  # 3 ends the prompt
        ({"max_tokens": None}, [5] * 30, ([5] * 17, "length", None)),  # 3 + 17 = max_model_len
    ],
)
def test_append(sampling: dict[str, Any], drawn: list[int], expected: tuple[list[int], str, int]) -> None:
    seq = sequence(**sampling)
    assert stop.append(seq, drawn) == expected
    assert seq.tokens == [1, 2, 3, *expected[0]]
