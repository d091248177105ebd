"""The compiled CPU backend: no torch; the model becomes a tape of kernels."""

from __future__ import annotations

import platform
from dataclasses import replace

from octavo.config import EngineOptions, Hardware, resolve
from octavo.device.kernels.numba.library import KernelLibrary
from octavo.device.platform.machine import available_bytes
from octavo.engine.cache.layout import plan_layout
from octavo.files.base import ModelFiles
from octavo.host.built import Built, Progress, Timeline, limits_of
from octavo.model.arch import ArchConfig
from octavo.model.describe import cache_specs, describe
from octavo.runner.cpu.runner import BYTES_PER_ELEMENT, CPURunner
from octavo.runner.cpu.support import kernels_for
from octavo.runner.cpu.threads import available_threads
from octavo.runner.memory import plan_pages


def build(
    options: EngineOptions, files: ModelFiles, arch: ArchConfig, timeline: Timeline, progress: Progress
) -> Built:
    """Lower the model, repack its weights, size the cache."""
    timeline.end("imports")
    threads = options.device.threads or available_threads()
    free, total = available_bytes()
    name = platform.processor() or platform.machine()
    resolved = resolve(options, Hardware("cpu", name, total, threads, True), limits_of(arch))
    spec = describe(arch)
    layout = plan_layout(cache_specs(spec, resolved.page_size, BYTES_PER_ELEMENT))
    weights = sum(tensor.nbytes for tensor in files.tensors.values())
    memory = plan_pages(
        layout,
        options.cache,
        kind="cpu",
        free_bytes=max(0, free - weights),
        total_bytes=total,
        peak_bytes=0,
        max_model_len=resolved.max_model_len,
        length_is_fixed=options.model.max_model_len not in (None, "auto", "-1"),
        max_num_seqs=resolved.max_num_seqs,
        step_tokens=resolved.max_num_batched_tokens,
    )
    resolved = replace(resolved, max_model_len=memory.max_model_len, dtype="int8/bfloat16")
    quantization = options.model.quantization.upper() if options.model.quantization else None
    library = prepare(options, files, arch, progress)
    timeline.end("kernels")
    runner = CPURunner(
        spec,
        files,
        layout,
        num_pages=memory.num_pages,
        num_slots=resolved.max_num_seqs,
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        max_model_len=resolved.max_model_len,
        threads=threads,
        progress=lambda done, total: progress("loading weights", done, total),
        quantization=quantization,
        library=library,
    )
    timeline.end("weights")
    return Built(runner, arch, resolved, memory, name, runner.explain())


def prepare(options: EngineOptions, files: ModelFiles, arch: ArchConfig, progress: Progress) -> KernelLibrary:
    """Compile the kernels that the model needs, or find them compiled; they are kept for each type of CPU."""
    library = KernelLibrary()
    quantization = options.model.quantization.upper() if options.model.quantization else None
    wanted = kernels_for(describe(arch), files, quantization)
    library.warm(wanted, lambda done, total: progress("preparing kernels", done, total))
    return library
