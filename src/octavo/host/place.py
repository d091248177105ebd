"""What one rank of several is told about itself: its slice of every layer, its stage, and how it speaks to the others."""

from __future__ import annotations

import platform as system
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from octavo.config import ParallelOptions
from octavo.device.distributed.one_shot import make_reduce
from octavo.device.distributed.world import World
from octavo.model.layers.build import ALONE, Ranks
from octavo.model.network import NO_PIPE, Pipe


@dataclass(frozen=True)
class Place:
    """The defaults are those of a model on one device. ``agree`` makes rank 0's tokens everybody's (see
    ``Group.broadcast``); ``least`` takes the smallest of each number over all ranks; ``tells``: somebody reads this rank's
    results."""

    ranks: Ranks = ALONE
    pipe: Pipe = NO_PIPE
    stage: int = 0
    num_stages: int = 1
    agree: Callable[[Tensor], Callable[[], object]] | None = None
    least: Callable[[list[int]], list[int]] = list
    tells: bool = True


def take_place(world: World, parallel: ParallelOptions, dtype: torch.dtype) -> Place:
    """This rank's place in a world; a collective call."""
    group, everyone = world.tensor, world.everyone
    hosts = world.exchange("host", system.node().encode())
    within_machine = len({hosts[member] for member in group.members}) == 1
    one_shot = within_machine and not parallel.disable_custom_all_reduce
    ranks = ALONE
    if group.size > 1:
        reduce = make_reduce(group, dtype, world.device, one_shot=one_shot)
        ranks = Ranks(group.rank, group.size, reduce, group.gather)
    before, behind = world.before, world.behind
    return Place(
        ranks=ranks,
        pipe=Pipe(
            receive=partial(everyone.receive, source=before) if before is not None else None,
            send=partial(everyone.send, to=behind) if behind is not None else None,
        ),
        stage=world.stage,
        num_stages=world.num_stages,
        agree=everyone.broadcast,
        least=partial(everyone.least, device=world.device),
        tells=behind is None or parallel.is_rank,
    )
