"""Are these devices alike? Asked before any weight is loaded, because one odd card makes all of them slow or wrong."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from octavo.errors import UsageError

GIB = 1 << 30
FREE_SHARE = 0.85  # of what the emptiest card has free


class Card(msgspec.Struct, frozen=True):
    """What a rank says of its device; ``num_peers`` counts the other devices whose memory it can reach."""

    rank: int
    host: str
    index: int
    name: str
    total_bytes: int
    capability: str
    driver: str
    free_bytes: int
    num_peers: int

    @property
    def place(self) -> str:
        """Where it sits."""
        return f"GPU {self.index} of {self.host} (rank {self.rank})"


def cuda_card(rank: int, host: str, device: torch.device, num_local: int) -> Card:
    """The report on one CUDA device among the first ``num_local``."""
    properties = torch.cuda.get_device_properties(device)
    index = device.index or 0
    others = [other for other in range(num_local) if other != index]
    return Card(
        rank,
        host,
        index,
        str(properties.name),
        int(properties.total_memory),
        f"{properties.major}.{properties.minor}",
        driver_version(),
        int(torch.cuda.mem_get_info(device)[0]),
        sum(torch.cuda.can_device_access_peer(index, other) for other in others),
    )


def check_count(needed: int) -> None:
    """Raise ``UsageError`` where fewer CUDA devices are visible than this machine has ranks."""
    count = torch.cuda.device_count()
    if count < needed:
        raise UsageError(
            f"{needed} ranks need {needed} GPUs on this machine, but {count} {'is' if count == 1 else 'are'} visible.",
            "Choose a smaller --tensor-parallel-size or --pipeline-parallel-size, or see CUDA_VISIBLE_DEVICES.",
        )


def driver_version() -> str:
    """The kernel driver's version, as Linux tells it, or "unknown"."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    found = re.search(r"Module\D*(\d+\.[\d.]+)", text)
    return found[1] if found else "unknown"


def check_cards(cards: list[Card]) -> str:
    """One line about cards that are alike; raises ``UsageError`` that names the odd one and how it differs."""
    facts: tuple[tuple[str, Callable[[Card], object]], ...] = (
        ("is another model", lambda card: card.name),
        ("has another compute capability", lambda card: card.capability),
        ("has another memory size", lambda card: f"{card.total_bytes / GIB:.1f} GiB"),
        ("runs another driver", lambda card: card.driver),
        ("reaches another number of cards directly", lambda card: card.num_peers),
    )
    for what, fact in facts:
        usual = Counter(fact(card) for card in cards).most_common(1)[0][0]
        odd = [card for card in cards if fact(card) != usual]
        if odd:
            found = ", ".join(f"{card.place}: {fact(card)}" for card in odd)
            raise UsageError(
                f"The devices of one model must be alike, but one {what}: {found}; the others: {usual}.",
                "Choose equal cards with CUDA_VISIBLE_DEVICES, or a smaller --tensor-parallel-size.",
            )
    most = max(card.free_bytes for card in cards)
    full = [card for card in cards if card.free_bytes < FREE_SHARE * most]
    if full:
        found = ", ".join(f"{card.place} has {card.free_bytes / GIB:.1f} GiB" for card in full)
        raise UsageError(
            f"The devices of one model need the same free memory: {found} free, the others up to {most / GIB:.1f} GiB.",
            "End what else runs there, or choose other cards with CUDA_VISIBLE_DEVICES.",
        )
    first = cards[0]
    return (
        f"{len(cards)} x {first.name}, {first.total_bytes / GIB:.1f} GiB, compute capability {first.capability}, "
        f"driver {first.driver}, each reaches {first.num_peers} others directly"
    )
