"""The compiled CPU backend: no torch; the model becomes a tape of kernels."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace

from octavo.config import GIB, EngineOptions, Hardware, Resolved, resolve
from octavo.device.kernels.numba.library import KernelLibrary
from octavo.device.platform.machine import available_bytes
from octavo.engine.cache.layout import CacheLayout, plan_layout
from octavo.errors import OutOfMemoryError
from octavo.files.base import ModelFiles
from octavo.host.built import Built, Progress, Timeline, limits_of
from octavo.model.arch import ArchConfig
from octavo.model.blocks import DecoderSpec
from octavo.model.describe import cache_specs, describe
from octavo.runner.cpu.runner import BYTES_PER_ELEMENT, CPURunner
from octavo.runner.cpu.support import kernels_for
from octavo.runner.cpu.threads import available_threads
from octavo.runner.memory import MemoryPlan, plan_pages


@dataclass(frozen=True)
class Plan:
    """What is decided before anything is loaded."""

    options: EngineOptions
    files: ModelFiles
    arch: ArchConfig
    spec: DecoderSpec
    layout: CacheLayout
    resolved: Resolved
    memory: MemoryPlan
    threads: int
    device: str

    @property
    def quantization(self) -> str | None:
        """The block type that plain weights get."""
        asked = self.options.model.quantization
        return asked.upper() if asked else None

    @property
    def kernels(self) -> list[str]:
        """Names of the kernels that the model needs."""
        return kernels_for(self.spec, self.files, self.quantization)


def make_plan(options: EngineOptions, files: ModelFiles, arch: ArchConfig) -> Plan:
    """Limits, layout and size of the cache."""
    threads = options.device.threads or available_threads()
    free, total = available_bytes()
    name = platform.processor() or platform.machine()
    resolved = resolve(options, Hardware("cpu", name, total, threads, True), limits_of(arch))
    spec = describe(arch)
    layout = plan_layout(cache_specs(spec, resolved.page_size, BYTES_PER_ELEMENT))
    weights = sum(tensor.nbytes for tensor in files.tensors.values())
    if weights > free:
        raise OutOfMemoryError(
            f"{files.name} needs {weights / GIB:.2f} GiB for its weights, but {free / GIB:.2f} GiB of {total / GIB:.2f} GiB "
            "are free.",
            "Free some memory, or use a smaller model or a GGUF file with fewer bits a weight.",
        )
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
    return Plan(options, files, arch, spec, layout, resolved, memory, threads, name)


def build(
    options: EngineOptions, files: ModelFiles, arch: ArchConfig, timeline: Timeline, progress: Progress
) -> Built:
    """Lower the model, repack its weights, size the cache."""
    timeline.end("imports")
    plan = make_plan(options, files, arch)
    library = warmed(plan, progress)
    timeline.end("kernels")
    built = load(plan, library, progress)
    timeline.end("weights")
    return built


def load(plan: Plan, library: KernelLibrary, progress: Progress) -> Built:
    """The runner with its weights."""
    resolved, memory = plan.resolved, plan.memory
    runner = CPURunner(
        plan.spec,
        plan.files,
        plan.layout,
        num_pages=memory.num_pages,
        num_slots=resolved.max_num_seqs,
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        max_model_len=resolved.max_model_len,
        threads=plan.threads,
        progress=lambda done, total: progress("loading weights", done, total),
        quantization=plan.quantization,
        library=library,
    )
    return Built(runner, plan.arch, resolved, memory, plan.device, runner.explain())


def warmed(plan: Plan, progress: Progress) -> KernelLibrary:
    """The model's kernels, compiled now or found compiled; they are kept for each type of CPU."""
    library = KernelLibrary()
    library.warm(plan.kernels, lambda done, total: progress("preparing kernels", done, total))
    return library


def load_ahead() -> None:
    """Load what every model runs, where it is compiled already: the first kernel of a process costs a quarter of a second,
    because Numba gets ready for it."""
    library = KernelLibrary()
    if not library.missing([]):
        library.execute()


def prepare(options: EngineOptions, files: ModelFiles, arch: ArchConfig, progress: Progress) -> None:
    """Compile what a start would have to."""
    warmed(make_plan(options, files, arch), progress)
