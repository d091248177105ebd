"""Devices that should be alike: the odd one is named, whatever is odd about it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from octavo.device.distributed.cards import GIB, Card, check_cards
from octavo.errors import UsageError


def cards(count: int = 4, **odd: Any) -> list[Card]:
    """Equal cards but for what ``odd`` changes of number 2."""
    made = [
        Card(
            rank=i,
            host="alpha",
            index=i,
            name="NVIDIA H100",
            total_bytes=80 * GIB,
            capability="9.0",
            driver="570.1",
            free_bytes=79 * GIB,
            num_peers=count - 1,
        )
        for i in range(count)
    ]
    if odd:
        made[2] = msgspec.structs.replace(made[2], **odd)
    return made


def test_equal_cards_pass_with_a_report() -> None:
    report = check_cards(cards())
    assert report == (
        "4 x NVIDIA H100, 80.0 GiB, compute capability 9.0, driver 570.1, each reaches 3 others directly"
    )
    assert check_cards(cards(1))


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        ({"name": "NVIDIA A100"}, "is another model: GPU 2 of alpha (rank 2): NVIDIA A100; the others: NVIDIA H100"),
        ({"capability": "8.0"}, "has another compute capability: GPU 2 of alpha (rank 2): 8.0; the others: 9.0"),
        ({"total_bytes": 40 * GIB}, "has another memory size: GPU 2 of alpha (rank 2): 40.0 GiB; the others: 80.0 GiB"),
        ({"driver": "550.2", "host": "beta"}, "runs another driver: GPU 2 of beta (rank 2): 550.2; the others: 570.1"),
        ({"num_peers": 0}, "reaches another number of cards directly: GPU 2 of alpha (rank 2): 0; the others: 3"),
        ({"free_bytes": 20 * GIB}, "GPU 2 of alpha (rank 2) has 20.0 GiB free, the others up to 79.0 GiB"),
    ],
)  # fmt: skip
def test_the_odd_card_is_named(odd: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_cards(cards(**odd))
    assert told in caught.value.cause
    assert "CUDA_VISIBLE_DEVICES" in (caught.value.cure or "")


def test_a_little_less_free_memory_is_no_reason() -> None:
    check_cards(cards(free_bytes=70 * GIB))
