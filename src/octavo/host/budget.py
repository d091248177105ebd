"""A start's memory: refused before anything is loaded where it cannot fit, then planned against measured."""

from __future__ import annotations

from octavo.config import EngineOptions, Hardware, Resolved
from octavo.device.platform.base import Platform
from octavo.device.platform.gpus import GIB, GPU
from octavo.engine.cache.layout import CacheLayout
from octavo.errors import OutOfMemoryError
from octavo.files.base import ModelFiles
from octavo.host.plan import (
    CONTEXT_BYTES,
    SCHEMES,
    Planner,
    gib,
    held_scheme,
    predict,
    table_bytes,
)
from octavo.model.arch import ArchConfig
from octavo.model.blocks import DecoderSpec
from octavo.model.describe import describe
from octavo.model.footprint import DENSE, Scheme, work_bytes
from octavo.runner.memory import plan_pages


class StartBudget:
    """``use`` holds part -> (planned, measured) bytes, in the order of the start; empty on CPUs, whose memory is not
    ours alone."""

    def __init__(
        self,
        options: EngineOptions,
        resolved: Resolved,
        arch: ArchConfig,
        spec: DecoderSpec,
        layout: CacheLayout,
        hardware: Hardware,
        platform: Platform,
        capability: int,
        files: ModelFiles,
    ) -> None:
        self.options = options
        self.resolved = resolved
        self.arch = arch
        self.layout = layout
        self.hardware = hardware
        self.platform = platform
        self.capability = capability
        self.on_gpu = platform.kind == "cuda"
        self.files = files
        self.scheme = self._scheme()
        graphs = self.on_gpu and not options.device.enforce_eager
        self.parts = predict(
            spec,
            self.scheme,
            resolved,
            layout,
            graphs=graphs,
            on_gpu=self.on_gpu,
            counted=arch.num_parameters,
        )
        self.pages = table_bytes(layout, resolved)
        self.work = work_bytes(spec) if self.on_gpu else 0
        self.free = platform.free_bytes()
        self.cache = self._planned_cache()
        self.use: dict[str, tuple[int, int]] = {}

    def _scheme(self) -> Scheme:
        """How the weights are held here; on CPUs the blocks of GGUF files and MXFP4 are decoded, unless asked for."""
        asked = self.options.model.quantization
        held = None if self.arch.num_parameters else held_scheme(self.files, describe(self.arch))
        if held is not None and (self.on_gpu or held.name not in ("gguf", "mxfp4") or asked == held.name):
            return held
        return SCHEMES.get(asked, DENSE)

    def require_room(self) -> None:
        """Raise ``OutOfMemoryError`` with numbers and cure where weights and a first page cannot fit.

        Weights are known to the byte. A step is an estimate, of which three quarters must fit here; the measured step
        decides later.
        """
        parts, total = self.parts, self.hardware.total_memory_bytes
        share = self.options.cache.gpu_memory_utilization
        room = self.free - parts.weights - parts.tables
        needed, limit = f"{gib(parts.weights)} for its weights", ""
        if self.on_gpu:
            room -= int(total * (1 - share)) + parts.step * 3 // 4
            needed += (
                f" and about {gib(parts.step)} for a step of {self.resolved.max_num_batched_tokens} tokens"
            )
            limit = (
                f", and --gpu-memory-utilization {share:g} leaves {gib(int(total * (1 - share)))} of it alone"
            )
        if room >= self.layout.pool_page_bytes:
            return
        cure = "Use a smaller model, or a GGUF file with fewer bits a weight."
        if self.on_gpu:
            usable = (self.free - total * (1 - share) + CONTEXT_BYTES) / share
            here = GPU(self.hardware.name, max(usable, 1) / GIB, self.capability)
            cure = Planner(self.options, self.files, self.arch).advice(here, self.scheme)
        raise OutOfMemoryError(
            f"{self.files.name} needs {needed}, but {self.hardware.name} has {gib(self.free)} of {gib(total)} free{limit}.",
            cure,
        )

    def weights_loaded(self) -> None:
        """Weights and rotary tables are on the device."""
        self._measure("weights", self.parts.weights + self.parts.tables - self.pages - self.work)

    def step_measured(self, measured: int) -> None:
        """The largest step has run."""
        if self.on_gpu:
            self.use["step"] = (self.parts.step, measured)
        self.free = self.platform.free_bytes()

    def cache_allocated(self) -> None:
        """Pages, page tables and the runner's buffers are on the device."""
        self._measure("cache", self.cache + self.pages)

    def graphs_captured(self) -> None:
        """All graphs are recorded."""
        self._measure("graphs", self.parts.graphs)

    def _planned_cache(self) -> int:
        """The cache's pages as they were to be expected before anything was loaded."""
        parts, resolved = self.parts, self.resolved
        try:
            memory = plan_pages(
                self.layout,
                self.options.cache,
                kind=self.platform.kind,
                free_bytes=max(0, self.free - parts.weights - parts.tables),
                total_bytes=self.hardware.total_memory_bytes,
                peak_bytes=parts.step,
                graph_bytes=parts.graphs,
                max_model_len=resolved.max_model_len,
                length_is_fixed=False,
                max_num_seqs=resolved.max_num_seqs,
                step_tokens=resolved.max_num_batched_tokens,
            )
        except OutOfMemoryError:
            return 0
        return memory.cache_bytes

    def _measure(self, part: str, planned: int) -> None:
        if not self.on_gpu:
            return
        self.platform.synchronize()
        free = self.platform.free_bytes()
        self.use[part] = (planned, self.free - free)
        self.free = free
