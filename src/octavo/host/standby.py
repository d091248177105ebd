"""The first start on a kind of CPU: the torch path answers while the kernels are compiled, then the compiled path takes over.

Both runners have the same page layout, number of pages and slots, so the engine's bookkeeping stays; what runs at the change
is computed anew, because the two do not store keys and values in the same way.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

from octavo.config import EngineOptions
from octavo.device.kernels.numba.library import KernelLibrary
from octavo.engine.executor.inline import InlineExecutor
from octavo.engine.relief import Successor
from octavo.engine.settings import EngineSettings
from octavo.errors import OctavoError
from octavo.files.base import ModelFiles
from octavo.host.built import Built, Progress, Timeline, quiet
from octavo.host.compiled_engine import Plan, load, make_plan, warmed
from octavo.model.arch import ArchConfig

LOG = logging.getLogger(__name__)


class CompiledRelief:
    """Compiles ``names`` in a process of its own, then lets ``build`` make the successor in a thread.

    Where either fails the torch path stays, and the log says why.
    """

    def __init__(self, names: list[str], build: Callable[[], Successor]) -> None:
        self._build = build
        self._ready: Successor | None = None
        self._closing = False
        command = [sys.executable, "-m", "octavo.host.warm", *names]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        self._thread = threading.Thread(target=self._work, name="octavo-relief", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        status = self._child.wait()
        if self._child.stdin is not None:
            self._child.stdin.close()
        if self._closing:
            return
        if status:
            LOG.warning("The kernels were not compiled (status %d): the torch path goes on.", status)
            return
        try:
            successor = self._build()
        except (OctavoError, OSError, RuntimeError, ValueError, MemoryError) as error:
            LOG.warning("The compiled path did not start: %s The torch path goes on.", error)
            return
        if self._closing:
            successor.executor.close()
        else:
            self._ready = successor

    @property
    def ready(self) -> bool:
        """See ``Relief``."""
        return self._ready is not None

    def take(self) -> Successor:
        """See ``Relief``."""
        ready, self._ready = self._ready, None
        if ready is None:
            raise RuntimeError("the successor is not ready")
        return ready

    def close(self) -> None:
        """See ``Relief``; what is compiled by then stays in the cache."""
        self._closing = True
        self._child.kill()
        self._thread.join()
        if self._ready is not None:
            self._ready.executor.close()


def start(
    options: EngineOptions,
    files: ModelFiles,
    arch: ArchConfig,
    timeline: Timeline,
    progress: Progress,
    describe: Callable[[Built], EngineSettings],
) -> tuple[Built, CompiledRelief] | None:
    """The torch runner and whoever relieves it; None where the kernels are there, or the two would not fit together."""
    plan = make_plan(options, files, arch)
    missing = KernelLibrary().missing(plan.kernels)
    if not missing:
        return None

    def successor() -> Successor:
        built = load(plan, warmed(plan, quiet), quiet)
        return Successor(InlineExecutor(built.runner), describe(built))

    progress(f"compiling {len(missing)} kernels; until then the torch path answers", 0, 0)
    relief = CompiledRelief(plan.kernels, successor)
    try:
        built: Built = import_module("octavo.host.torch_engine").build(
            understudy(options, plan), files, arch, timeline, progress
        )
    except BaseException:
        relief.close()
        raise
    runner = built.runner
    if (runner.layout, runner.num_pages, runner.num_slots) != (
        plan.layout,
        plan.memory.num_pages,
        plan.resolved.max_num_seqs,
    ):
        runner.close()
        relief.close()
        return None
    return built, relief


def understudy(options: EngineOptions, plan: Plan) -> EngineOptions:
    """Options of a torch engine with the same pages, slots and limits; bfloat16, as the compiled path's cache.

    One thread fewer: the compiler needs it, and torch's threads wait for each other by spinning.
    """
    resolved, threads = plan.resolved, max(1, plan.threads - 1)
    return replace(
        options,
        model=replace(options.model, dtype="bfloat16", max_model_len=str(resolved.max_model_len)),
        device=replace(options.device, device="cpu", cpu_backend="torch", threads=threads),
        cache=replace(options.cache, num_gpu_blocks_override=plan.memory.num_pages),
        scheduler=replace(
            options.scheduler,
            max_num_seqs=resolved.max_num_seqs,
            max_num_batched_tokens=resolved.max_num_batched_tokens,
        ),
    )
