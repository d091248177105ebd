"""The torch backend: load the network on a platform, measure the largest step, size the cache, capture graphs."""

from __future__ import annotations

from dataclasses import replace

import torch

from octavo.config import EngineOptions, Resolved, resolve
from octavo.device.ops.bind import Binder
from octavo.device.platform.base import Platform
from octavo.device.platform.select import open_platform
from octavo.engine.cache.layout import CacheLayout, plan_layout
from octavo.files.base import ModelFiles
from octavo.host.built import Built, Progress, Timeline, limits_of
from octavo.model.arch import ArchConfig
from octavo.model.blocks import DecoderSpec
from octavo.model.describe import cache_specs, describe
from octavo.model.load import hf_renaming
from octavo.model.network import Network
from octavo.model.quantization.choose import choose_format
from octavo.protocol.generate import SamplingParams
from octavo.protocol.plan import SlotInit, StepPlan
from octavo.runner.graphs import StepGraphs
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
    op_spec = platform.op_spec(dtype)
    weight_format = choose_format(
        options.model.quantization, spec, op_spec, files, hf_renaming(files, spec.bare_prefix)
    )
    timeline.end("imports")
    network = Network(
        spec,
        dtype=dtype,
        device=platform.device,
        binder=binder,
        op_spec=op_spec,
        max_position=resolved.max_model_len,
        weight_format=weight_format,
    )
    network.load(files, progress=lambda done, total: progress("loading weights", done, total))
    platform.synchronize()
    timeline.end("weights")
    layout = plan_layout(cache_specs(spec, resolved.page_size, dtype.itemsize))
    peak = measure_peak(network, spec, layout, platform, binder, resolved)
    timeline.end("profile")
    memory = plan_pages(
        layout,
        options.cache,
        kind=platform.kind,
        free_bytes=platform.free_bytes(),
        total_bytes=hardware.total_memory_bytes,
        peak_bytes=peak,
        max_model_len=resolved.max_model_len,
        length_is_fixed=options.model.max_model_len not in (None, "auto", "-1"),
        max_num_seqs=resolved.max_num_seqs,
        step_tokens=resolved.max_num_batched_tokens,
    )
    resolved = replace(resolved, max_model_len=memory.max_model_len)
    runner = torch_runner(network, spec, layout, platform, binder, resolved, memory.num_pages)
    timeline.end("cache")
    if platform.kind == "cuda" and not options.device.enforce_eager:
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
) -> int:
    """Bytes that the largest step holds above weights and cache: full token budget, every row sampling at random
    with penalties and log probabilities; run through the real runner on one-page memory."""
    if platform.kind == "cpu":
        return 0
    rows = min(resolved.max_num_seqs, resolved.max_num_batched_tokens)
    tokens = resolved.max_num_batched_tokens
    share = [tokens // rows + (1 if i < tokens % rows else 0) for i in range(rows)]
    share = [min(count, resolved.max_model_len) for count in share]
    sampling = SamplingParams(temperature=1.0, top_p=0.9, logprobs=1, repetition_penalty=1.1)
    runner = torch_runner(network, spec, layout, platform, binder, resolved, 2)
    admits = [SlotInit(i, [0] * share[i], share[i], sampling, 0, []) for i in range(rows)]
    plan = StepPlan(0, list(range(rows)), [0] * rows, share, [0] * rows, [True] * rows, admits, [], [])

    def work() -> None:
        runner.forward(plan)
        runner.sample([])
        runner.collect()

    peak = platform.peak_bytes(work)
    runner.close()
    return peak
