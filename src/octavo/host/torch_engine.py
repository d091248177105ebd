"""The torch backend: load the network on a platform, measure the largest step, size the cache, capture graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from octavo.config import EngineOptions, Resolved, resolve
from octavo.device.distributed.world import World
from octavo.device.ops.bind import Binder
from octavo.device.platform.base import Platform
from octavo.device.platform.select import open_platform
from octavo.engine.cache.layout import CacheLayout, plan_layout
from octavo.files.base import ModelFiles
from octavo.host.built import Built, Progress, Timeline, limits_of
from octavo.host.place import Place, take_place
from octavo.host.spread import part_of
from octavo.model.arch import ArchConfig
from octavo.model.describe import cache_specs, describe
from octavo.model.network import Network
from octavo.model.quantization.fp8 import choose_format
from octavo.model.stage import cut
from octavo.protocol.generate import SamplingParams
from octavo.protocol.plan import SlotInit, StepPlan
from octavo.runner.graphs import StepGraphs
from octavo.runner.memory import MemoryPlan, plan_pages
from octavo.runner.pages import PageMemory
from octavo.runner.runner import TorchRunner
from octavo.runner.warm import warm

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def build(
    options: EngineOptions,
    files: ModelFiles,
    arch: ArchConfig,
    timeline: Timeline,
    progress: Progress,
    platform: Platform | None = None,
    world: World | None = None,
) -> Built:
    """Load the network on the platform, measure, size the cache, capture graphs; with a ``world`` this rank's part, in
    step with the others."""
    platform = platform or open_platform(options.device.device, threads=options.device.threads)
    hardware = platform.hardware()
    resolved = resolve(options, hardware, limits_of(arch))
    dtype = DTYPES[resolved.dtype]
    place = Place() if world is None else take_place(world, options.parallel, dtype)
    whole = part_of(describe(arch), options)
    spec = cut(whole, place.stage, place.num_stages)
    binder = Binder()
    op_spec = platform.op_spec(dtype)
    weight_format = choose_format(options.model.quantization, spec, op_spec)
    timeline.end("imports")
    network = Network(
        spec,
        dtype=dtype,
        device=platform.device,
        binder=binder,
        op_spec=op_spec,
        max_position=resolved.max_model_len,
        weight_format=weight_format,
        ranks=place.ranks,
        pipe=place.pipe,
    )
    network.load(files, progress=lambda done, total: progress("loading weights", done, total))
    platform.synchronize()
    timeline.end("weights")
    layout = plan_layout(cache_specs(whole, resolved.page_size, dtype.itemsize))
    if place.num_stages > 1:
        layout = layout.part(range(spec.first_layer, spec.first_layer + len(spec.layers)))
    make = partial(torch_runner, network, layout, platform, binder, place.agree)
    progress("measuring the largest step", 0, 1)
    peak = measure_peak(make, platform, resolved)
    timeline.end("profile")
    memory = size_cache(options, layout, platform, resolved, peak, place)
    resolved = replace(resolved, max_model_len=memory.max_model_len)
    runner = make(resolved, memory.num_pages)
    timeline.end("cache")
    if platform.kind == "cuda":
        get_ready(runner, resolved, timeline, progress, graphs=not options.device.enforce_eager)
    return Built(runner, arch, resolved, memory, hardware.name, binder.explain())


def size_cache(
    options: EngineOptions,
    layout: CacheLayout,
    platform: Platform,
    resolved: Resolved,
    peak: int,
    place: Place,
) -> MemoryPlan:
    """Pages and context length that fit on every rank; ranks on CPUs share one memory."""
    sharers = place.ranks.size * place.num_stages if platform.kind == "cpu" else 1
    memory = plan_pages(
        layout,
        options.cache,
        kind=platform.kind,
        free_bytes=platform.free_bytes() // sharers,
        total_bytes=platform.hardware().total_memory_bytes,
        peak_bytes=peak,
        max_model_len=resolved.max_model_len,
        length_is_fixed=options.model.max_model_len not in (None, "auto", "-1"),
        max_num_seqs=resolved.max_num_seqs,
        step_tokens=resolved.max_num_batched_tokens,
    )
    num_pages, max_model_len = place.least([memory.num_pages, memory.max_model_len])
    return replace(memory, num_pages=num_pages, max_model_len=max_model_len)


def get_ready(
    runner: TorchRunner, resolved: Resolved, timeline: Timeline, progress: Progress, *, graphs: bool
) -> None:
    """Record graphs where they are wanted, then run every shape class once."""
    if graphs:
        recorded = StepGraphs(
            runner.network, runner.slots, runner.builder, runner.platform, resolved.max_model_len
        )
        recorded.capture(
            resolved.max_num_seqs,
            resolved.max_num_batched_tokens,
            lambda done, total: progress("capturing graphs", done, total),
        )
        runner.graphs = recorded
        timeline.end("graphs")
    progress("warming up", 0, 1)
    warm(runner, resolved.max_model_len)
    timeline.end("warm")


def torch_runner(
    network: Network,
    layout: CacheLayout,
    platform: Platform,
    binder: Binder,
    agree: Callable[[Tensor], Tensor] | None,
    resolved: Resolved,
    num_pages: int,
) -> TorchRunner:
    """A runner over ``num_pages`` fresh pages."""
    return TorchRunner(
        network,
        PageMemory(layout, num_pages, platform.device),
        platform,
        binder,
        vocab_size=network.spec.embedding.vocab_size,
        num_slots=resolved.max_num_seqs,
        max_tokens=resolved.max_num_batched_tokens,
        max_model_len=resolved.max_model_len,
        agree=agree,
    )


def measure_peak(make: Callable[[Resolved, int], TorchRunner], platform: Platform, resolved: Resolved) -> int:
    """Bytes that the largest step holds above weights and cache: full token budget, every row sampling at random
    with penalties and log probabilities; run through the real runner on one-page memory."""
    if platform.kind == "cpu":
        return 0
    rows = min(resolved.max_num_seqs, resolved.max_num_batched_tokens)
    tokens = resolved.max_num_batched_tokens
    share = [tokens // rows + (1 if i < tokens % rows else 0) for i in range(rows)]
    share = [min(count, resolved.max_model_len) for count in share]
    sampling = SamplingParams(temperature=1.0, top_p=0.9, logprobs=1, repetition_penalty=1.1)
    runner = make(resolved, 2)
    admits = [SlotInit(i, [0] * share[i], share[i], sampling, 0, []) for i in range(rows)]
    plan = StepPlan(0, list(range(rows)), [0] * rows, share, [0] * rows, [True] * rows, admits, [], [])

    def work() -> None:
        runner.forward(plan)
        runner.sample([])
        runner.collect()

    peak = platform.peak_bytes(work)
    runner.close()
    return peak
