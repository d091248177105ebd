"""The engine's own process: ``python -m octavo.host [LIKELY_BACKEND] ADDRESS``."""

from __future__ import annotations

import logging
import sys
from functools import partial
from importlib import import_module

from octavo.engine.client.serve import run_engine
from octavo.engine.core import EngineCore
from octavo.host.ahead import open_gpu_ahead
from octavo.host.built import Progress, Timeline
from octavo.host.engine import BACKENDS, build_core
from octavo.host.launch import decode_options
from octavo.host.opening import open_files
from octavo.host.rehearsal import dismiss, wait_in_the_wings

log = logging.getLogger("octavo.engine")


def build(timeline: Timeline, raw: bytes, progress: Progress) -> EngineCore:
    """An engine from encoded options."""
    timeline.skip()  # the wait for the options is nobody's work
    options = decode_options(raw)
    core = build_core(options, open_files(options, progress), progress, timeline)
    dismiss(timeline.waiting)
    return core


def prepare(backend: str, timeline: Timeline) -> None:
    """Import what a backend needs; where that fails, the one that is chosen in the end says so."""
    if backend == "cuda":
        open_gpu_ahead()
        timeline.waiting = wait_in_the_wings()
    name = "torch" if backend == "cuda" else backend
    if name in BACKENDS:
        try:
            module = import_module(BACKENDS[name].partition(":")[0])
            if name == "compiled":
                module.load_ahead()
        except Exception as problem:  # noqa: BLE001  a guess must not end a start
            log.debug("Getting ready for %s failed: %s", name, problem)
    timeline.end("imports")


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    timeline, backend = Timeline.start(), arguments[0] if len(arguments) > 1 else ""
    return run_engine(arguments[-1], partial(build, timeline), partial(prepare, backend, timeline))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
