"""The torch backend: load the network on a platform, measure the largest step, size the cache, capture graphs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from octavo.config import EngineOptions, Resolved, resolve
from octavo.device.ops.bind import Binder
from octavo.device.platform.base import Platform
from octavo.device.platform.select import open_platform
from octavo.engine.cache.layout import CacheLayout, plan_layout
from octavo.files.base import ModelFiles
from octavo.host.built import Built, Progress, Timeline, limits_of
from octavo.host.fit import check_weights, weight_bytes
from octavo.model.arch import ArchConfig
from octavo.model.blocks import DecoderSpec
from octavo.model.describe import cache_specs, describe
from octavo.model.network import Network
from octavo.model.quantization.fp8 import choose_format
from octavo.runner.graphs import StepGraphs
from octavo.runner.measure import Peak, graph_bytes, run_largest_step
from octavo.runner.memory import plan_pages
from octavo.runner.pages import PageMemory
from octavo.runner.runner import TorchRunner
from octavo.runner.warm import warm

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def build(
    options: EngineOptions, files: ModelFiles, arch: ArchConfig, timeline: Timeline, progress: Progress
) -> Built:
    """Load the network on the platform, measure, size the cache, capture graphs."""
    platform = open_platform(options.device.device, threads=options.device.threads)
    hardware = platform.hardware()
    resolved = resolve(options, hardware, limits_of(arch))
    dtype = DTYPES[resolved.dtype]
    spec = describe(arch)
    binder = Binder()
    timeline.end("imports")
    network = load_network(spec, options, files, platform, binder, resolved, progress)
    timeline.end("weights")
    layout = plan_layout(cache_specs(spec, resolved.page_size, dtype.itemsize))
    graphs_wanted = platform.kind == "cuda" and not options.device.enforce_eager
    peak = measure_peak(network, spec, layout, platform, binder, resolved, graphs_wanted)
    timeline.end("profile")
    memory = plan_pages(
        layout,
        options.cache,
        kind=platform.kind,
        free_bytes=platform.free_bytes(),
        total_bytes=hardware.total_memory_bytes,
        peak_bytes=peak.step_bytes,
        graph_bytes=peak.graph_bytes,
        max_model_len=resolved.max_model_len,
        length_is_fixed=options.model.max_model_len not in (None, "auto", "-1"),
        max_num_seqs=resolved.max_num_seqs,
        step_tokens=resolved.max_num_batched_tokens,
    )
    resolved = replace(resolved, max_model_len=memory.max_model_len)
    runner = torch_runner(network, spec, layout, platform, binder, resolved, memory.num_pages)
    timeline.end("cache")
    if graphs_wanted:
        graphs = StepGraphs(network, runner.slots, runner.builder, platform, resolved.max_model_len)
        graphs.capture(
            resolved.max_num_seqs,
            resolved.max_num_batched_tokens,
            lambda done, total: progress("capturing graphs", done, total),
        )
        runner.graphs = graphs
        timeline.end("graphs")
    if platform.kind == "cuda":
        warm(runner, resolved.max_model_len)
        timeline.end("warm")
    return Built(runner, arch, resolved, memory, hardware.name, binder.explain())


def load_network(
    spec: DecoderSpec,
    options: EngineOptions,
    files: ModelFiles,
    platform: Platform,
    binder: Binder,
    resolved: Resolved,
    progress: Progress,
) -> Network:
    """The network with its weights on the platform; refused before anything is allocated where they do not fit."""
    dtype = DTYPES[resolved.dtype]
    op_spec = platform.op_spec(dtype)
    weight_format = choose_format(options.model.quantization, spec, op_spec)

    def make(device: torch.device, binder: Binder) -> Network:
        return Network(
            spec,
            dtype=dtype,
            device=device,
            binder=binder,
            op_spec=op_spec,
            max_position=resolved.max_model_len,
            weight_format=weight_format,
        )

    if platform.kind != "cpu":
        check_weights(weight_bytes(make), options, platform, dtype)
    network = make(platform.device, binder)
    network.load(files, progress=lambda done, total: progress("loading weights", done, total))
    platform.synchronize()
    return network


def torch_runner(
    network: Network,
    spec: DecoderSpec,
    layout: CacheLayout,
    platform: Platform,
    binder: Binder,
    resolved: Resolved,
    num_pages: int,
) -> TorchRunner:
    """A runner over ``num_pages`` fresh pages."""
    return TorchRunner(
        network,
        PageMemory(layout, num_pages, platform.device),
        platform,
        binder,
        vocab_size=spec.embedding.vocab_size,
        num_slots=resolved.max_num_seqs,
        max_tokens=resolved.max_num_batched_tokens,
        max_model_len=resolved.max_model_len,
    )


def measure_peak(
    network: Network,
    spec: DecoderSpec,
    layout: CacheLayout,
    platform: Platform,
    binder: Binder,
    resolved: Resolved,
    graphs: bool,
) -> Peak:
    """What the largest step holds above weights and cache, and what the recordings will; run through a runner over
    two pages."""
    if platform.kind == "cpu":
        return Peak()
    runner = torch_runner(network, spec, layout, platform, binder, resolved, 2)
    step = platform.peak_bytes(partial(run_largest_step, runner, resolved.max_model_len))
    recorded = graph_bytes(runner, resolved.max_model_len) if graphs else 0
    runner.close()
    return Peak(step, recorded)
