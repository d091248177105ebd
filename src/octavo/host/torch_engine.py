"""The torch backend: load the network on a platform, measure the largest step, size the cache, capture graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from octavo.config import EngineOptions, Resolved, resolve
from octavo.device.distributed.world import World
from octavo.device.kernels.keys import helpers_first
from octavo.device.ops.bind import Binder, OpSpec
from octavo.device.ops.fp8 import FP8, MIN_CAPABILITY
from octavo.device.platform.base import Platform
from octavo.device.platform.select import open_platform
from octavo.engine.cache.layout import CacheLayout
from octavo.errors import UsageError
from octavo.files.base import ModelFiles
from octavo.host.budget import StartBudget
from octavo.host.built import Built, Progress, Timeline, limits_of
from octavo.host.measured import proven
from octavo.host.place import Place, take_place
from octavo.host.plan import layout_of
from octavo.host.rehearsal import Rehearsal, begin
from octavo.host.spread import part_of
from octavo.model.arch import ArchConfig
from octavo.model.blocks import DecoderSpec, LatentAttention
from octavo.model.describe import describe
from octavo.model.face import AnyNetwork
from octavo.model.fallback.network import TransformersNetwork
from octavo.model.layers.build import CacheType
from octavo.model.layers.cache_scales import calibrated
from octavo.model.load import renaming
from octavo.model.network import Network
from octavo.model.quantization.base import WeightFormat
from octavo.model.quantization.choose import choose_format
from octavo.model.stage import cut
from octavo.runner.graphs import StepGraphs
from octavo.runner.measure import SLACK_BYTES, Peak, graph_bytes, run_largest_step
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
    whole = part_of(describe(arch), options) if world is not None else describe(arch)
    spec = cut(whole, place.stage, place.num_stages)
    binder = Binder(proven=proven(hardware.name) if platform.kind == "cuda" else frozenset())
    op_spec = platform.op_spec(dtype)
    # Ranks compile what they need themselves, and a model of transformers has few kernels of ours.
    alone = world is None and arch.implementation == "octavo"
    if platform.kind == "cuda":
        helpers_first()
    rehearsal = begin(options, hardware, op_spec.capability, alone, timeline.waiting)
    weight_format = choose_format(options.model.quantization, spec, op_spec, files, renaming(files, spec))
    layout = layout_of(whole, resolved)
    if place.num_stages > 1:
        layout = layout.part(range(spec.first_layer, spec.first_layer + len(spec.layers)))
    budget = StartBudget(options, resolved, arch, spec, layout, hardware, platform, op_spec.capability, files)
    budget.require_room()
    timeline.end("imports")
    network = make_network(arch, files, spec, binder, op_spec, platform, resolved, weight_format, place)
    load(network, files, rehearsal, budget, timeline, progress)
    graphs_wanted = platform.kind == "cuda" and not options.device.enforce_eager and network.recordable
    make = partial(torch_runner, network, layout, platform, binder, place)
    progress("measuring the largest step", 0, 1)
    peak = measure_peak(make, platform, resolved, graphs_wanted)
    budget.step_measured(peak.step_bytes)
    timeline.end("profile")
    memory = size_cache(options, layout, platform, resolved, peak, place)
    resolved = replace(resolved, max_model_len=memory.max_model_len)
    runner = make(resolved, memory.num_pages)
    budget.cache_allocated()
    timeline.end("cache")
    if graphs_wanted:
        record_graphs(runner, resolved, progress)
        budget.graphs_captured()
        timeline.end("graphs")
    keep_share(options, platform, peak)
    if platform.kind == "cuda":
        progress("warming up", 0, 1)
        warm(runner, resolved.max_model_len)
        keep_share(options, platform, peak)  # libraries have loaded their kernels meanwhile
        timeline.end("warm")
        rehearsal.keep()
    return Built(runner, arch, resolved, memory, hardware.name, binder.explain(), budget.use, platform.kind)


def load(
    network: AnyNetwork,
    files: ModelFiles,
    rehearsal: Rehearsal,
    budget: StartBudget,
    timeline: Timeline,
    progress: Progress,
) -> None:
    """Weights from the files to the device, while kernels are compiled beside that."""
    with rehearsal:
        network.load(files, progress=lambda done, total: progress("loading weights", done, total))
        budget.weights_loaded()
        timeline.end("weights")
        if rehearsal.process is not None:
            rehearsal.wait(progress)
            timeline.end("kernels")


def cache_type(
    arch: ArchConfig, spec: DecoderSpec, files: ModelFiles, op_spec: OpSpec, resolved: Resolved
) -> CacheType:
    """The type of keys and values; raises ``UsageError`` where they cannot have it."""
    found = CacheType(None, calibrated(files.tensors))
    if resolved.kv_cache_dtype == "auto":
        return found
    if op_spec.device == "cuda" and op_spec.capability < MIN_CAPABILITY:
        raise UsageError(
            "--kv-cache-dtype fp8 needs a GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell).",
            "Leave it out.",
        )
    latent = any(isinstance(layer.attention, LatentAttention) for layer in spec.layers)
    if latent or arch.implementation != "octavo":
        what = "latent attention, whose cache is small" if latent else "models that transformers computes"
        raise UsageError(f"--kv-cache-dtype fp8 does not cover {what}.", "Leave it out.")
    return replace(found, dtype=FP8)


def size_cache(
    options: EngineOptions,
    layout: CacheLayout,
    platform: Platform,
    resolved: Resolved,
    peak: Peak,
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
        peak_bytes=peak.step_bytes,
        graph_bytes=peak.graph_bytes,
        max_model_len=resolved.max_model_len,
        length_is_fixed=options.model.max_model_len not in (None, "auto", "-1"),
        max_num_seqs=resolved.max_num_seqs,
        step_tokens=resolved.max_num_batched_tokens,
    )
    num_pages, max_model_len = place.least([memory.num_pages, memory.max_model_len])
    return replace(memory, num_pages=num_pages, max_model_len=max_model_len)


def keep_share(options: EngineOptions, platform: Platform, peak: Peak) -> None:
    """Hold torch to what ``--gpu-memory-utilization`` leaves for steps: blocks that it keeps unused, because steps of
    other sizes left them, are given back before the share would be exceeded."""
    total = platform.hardware().total_memory_bytes
    left_alone = int(total * (1 - options.cache.gpu_memory_utilization))
    platform.bound(max(platform.free_bytes() - left_alone, peak.step_bytes + SLACK_BYTES))


def record_graphs(runner: TorchRunner, resolved: Resolved, progress: Progress) -> None:
    """Record steps of all sizes."""
    graphs = StepGraphs(runner.network, runner.slots, runner.builder, runner.platform, resolved.max_model_len)
    graphs.capture(
        resolved.max_num_seqs,
        resolved.max_num_batched_tokens,
        lambda done, total: progress("capturing graphs", done, total),
    )
    runner.graphs = graphs


def make_network(
    arch: ArchConfig,
    files: ModelFiles,
    spec: DecoderSpec,
    binder: Binder,
    op_spec: OpSpec,
    platform: Platform,
    resolved: Resolved,
    weight_format: WeightFormat,
    place: Place,
) -> AnyNetwork:
    """The model's modules on the device, not loaded yet: ours, or those of transformers."""
    dtype, device = DTYPES[resolved.dtype], platform.device
    kept = cache_type(arch, spec, files, op_spec, resolved)
    if arch.implementation != "octavo":
        return TransformersNetwork(arch, files, dtype=dtype, device=device, binder=binder, op_spec=op_spec)
    return Network(
        spec,
        dtype=dtype,
        device=device,
        binder=binder,
        op_spec=op_spec,
        max_position=resolved.max_model_len,
        weight_format=weight_format,
        ranks=place.ranks,
        pipe=place.pipe,
        cache_type=kept,
    )


def torch_runner(
    network: AnyNetwork,
    layout: CacheLayout,
    platform: Platform,
    binder: Binder,
    place: Place,
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
        agree=place.agree,
        tells=place.tells,
    )


def measure_peak(
    make: Callable[[Resolved, int], TorchRunner], platform: Platform, resolved: Resolved, graphs: bool
) -> Peak:
    """What the largest step holds above weights and cache, and what the recordings will; run through a runner over
    two pages."""
    if platform.kind == "cpu":
        return Peak()
    runner = make(resolved, 2)
    step = platform.peak_bytes(partial(run_largest_step, runner, resolved.max_model_len))
    recorded = graph_bytes(runner, resolved.max_model_len) if graphs else 0
    runner.close()
    return Peak(step, recorded)
