"""What a worker process builds: joins the other ranks, compares devices, loads this rank's part (see ``host.spread``)."""

from __future__ import annotations

import logging
import platform as system
from dataclasses import replace
from typing import Any

import msgspec
import torch

from octavo import host
from octavo.config import EngineOptions
from octavo.device.distributed.cards import Card, check_cards, check_count, cuda_card
from octavo.device.distributed.world import Meeting, World, join
from octavo.device.platform.base import Platform
from octavo.device.platform.machine import usable_cores
from octavo.device.platform.select import open_platform
from octavo.engine.executor.base import Seat, Started
from octavo.host.built import Built, Progress, Timeline
from octavo.host.implementation import architecture
from octavo.host.spread import Facts
from octavo.host.torch_engine import build as build_torch


def build(arguments: dict[str, Any], seat: Seat) -> Started:
    """The factory of ``host.spread.launch``."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    options = msgspec.convert(arguments["options"], EngineOptions)
    timeline = Timeline.start()
    built, cards = build_rank(options, seat.rank, seat.index, seat.folder, timeline, seat.report)
    device = cards or f"{options.parallel.ranks} x {built.device}"
    facts = Facts(built.resolved, device, built.kernels, timeline.phases, built.memory_use)
    return Started(built.runner, msgspec.json.encode(facts))


def build_rank(
    options: EngineOptions, rank: int, index: int, folder: str, timeline: Timeline, progress: Progress
) -> tuple[Built, str]:
    """Join, compare, load; returns the runner with its decisions, and one line about the devices.

    ``index`` is the rank's number on its machine, ``folder`` where ranks of one machine meet.
    """
    parallel = options.parallel
    num_local = parallel.ranks // parallel.nnodes
    threads = options.device.threads or max(1, usable_cores() // num_local)
    if options.device.device != "cpu" and torch.cuda.is_available():
        check_count(num_local)
    platform = open_platform(options.device.device, threads=threads, index=index)
    timeline.end("imports")
    progress("joining the other ranks", 0, 1)
    meeting = Meeting(
        rank=rank,
        size=parallel.ranks,
        tensor_size=parallel.tensor_parallel_size,
        timeout_s=parallel.distributed_timeout_seconds,
        path=f"{folder}/meeting" if parallel.nnodes == 1 else "",
        address=parallel.master_addr,
        port=parallel.master_port,
    )
    world = join(meeting, platform.device)
    cards = compare(world, platform, index, num_local)
    timeline.end("joining")
    options = replace(options, device=replace(options.device, threads=threads))
    files = host.open_files(options)
    arch = architecture(options.model, files)
    return build_torch(options, files, arch, timeline, progress, platform, world), cards


def compare(world: World, platform: Platform, index: int, num_local: int) -> str:
    """One line about the devices of all ranks; raises ``UsageError`` where they differ. CPUs need not be alike."""
    if platform.kind != "cuda":
        return ""
    card = cuda_card(world.rank, system.node(), platform.device, num_local)
    raw = world.exchange("card", msgspec.json.encode(card))
    return check_cards([msgspec.json.decode(each, type=Card) for each in raw])
