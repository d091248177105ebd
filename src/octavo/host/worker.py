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
from octavo.host.built import Built, Timeline
from octavo.host.implementation import architecture
from octavo.host.spread import Facts
from octavo.host.torch_engine import build as build_torch


def build(arguments: dict[str, Any], seat: Seat) -> Started:
    """The factory of ``host.spread.launch``."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    options = msgspec.convert(arguments["options"], EngineOptions)
    timeline = Timeline.start()
    built, cards = build_rank(options, seat, timeline)
    device = cards or f"{options.parallel.ranks} x {built.device}"
    facts = Facts(built.resolved, device, built.kernels, timeline.phases, built.memory_use, built.kind)
    return Started(built.runner, msgspec.json.encode(facts))


def build_rank(options: EngineOptions, seat: Seat, timeline: Timeline) -> tuple[Built, str]:
    """Join, compare, load; returns the runner with its decisions, and one line about the devices."""
    parallel = options.parallel
    options, platform = take_device(options, seat)
    timeline.end("imports")
    seat.report("joining the other ranks", 0, 1)
    meeting = Meeting(
        rank=seat.rank,
        size=parallel.ranks,
        tensor_size=parallel.tensor_parallel_size,
        timeout_s=parallel.distributed_timeout_seconds,
        path=f"{seat.folder}/meeting" if seat.folder and parallel.nnodes == 1 else "",
        address=parallel.master_addr,
        port=parallel.master_port,
    )
    world = join(meeting, platform.device)
    return build_part(options, world, platform, seat, timeline)


def take_device(options: EngineOptions, seat: Seat) -> tuple[EngineOptions, Platform]:
    """The rank's device, and its share of the machine's cores."""
    threads = options.device.threads or max(1, usable_cores() // seat.num_local)
    if options.device.device != "cpu" and torch.cuda.is_available():
        check_count(seat.num_local)
    platform = open_platform(options.device.device, threads=threads, index=seat.index)
    return replace(options, device=replace(options.device, threads=threads)), platform


def build_part(
    options: EngineOptions, world: World, platform: Platform, seat: Seat, timeline: Timeline
) -> tuple[Built, str]:
    """Compare and load, among ranks that have met."""
    cards = compare(world, platform, seat.index, seat.num_local)
    timeline.end("joining")
    files = host.open_files(options)
    arch = architecture(options.model, files)
    return build_torch(options, files, arch, timeline, seat.report, platform, world), cards


def compare(world: World, platform: Platform, index: int, num_local: int) -> str:
    """One line about the devices of all ranks; raises ``UsageError`` where they differ. CPUs need not be alike."""
    if platform.kind != "cuda":
        return ""
    card = cuda_card(world.rank, system.node(), platform.device, num_local)
    raw = world.exchange("card", msgspec.json.encode(card))
    return check_cards([msgspec.json.decode(each, type=Card) for each in raw])
