"""The first start on a machine: another process finds out which kernels the engine will launch, and has them all compiled
at a time, while the weights are loaded.

    engine     imports ────────── begin ──> weights ──── wait ──> largest step, graphs ...: all kernels are on disk ── keep
    rehearse   imports (waits)    a start on a card that computes nothing, one process a core that compiles

A mark beside Triton's cache says that such a start has succeeded here; then none of this happens.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self

import msgspec

from octavo import __version__
from octavo.config import EngineOptions, Hardware
from octavo.device.platform.machine import available_bytes, usable_cores
from octavo.engine.process import end_child
from octavo.host.built import Progress

log = logging.getLogger("octavo.engine")

COMMAND = (sys.executable, "-m", "octavo.host.rehearse")
LEAST_PROCESSES = 3  # with fewer, compiling beside the engine gains little
MOST_PROCESSES = 16
PROCESS_BYTES = 600 << 20  # that one of them needs at most
PATIENCE_S = 120.0
END_S = 2.0
KERNELS = Path(__file__).parents[1] / "device" / "kernels" / "triton"


class Play(msgspec.Struct):
    """What is to be rehearsed: a start with these options on such a card, with so many compiling processes."""

    options: EngineOptions
    facts: Hardware
    capability: int
    processes: int


@dataclass
class Rehearsal:
    """A process at work, or none, and the mark that its success will leave; as a context it ends with the block."""

    mark: Path | None = None
    process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.kill()  # the start has failed; those who compile end with its input
        self.end()

    def wait(self, progress: Progress) -> None:
        """Until all kernels are there, or the process has failed, or has taken so long that the engine had better compile
        what is missing."""
        process = self.process
        if process is None:
            return
        late = threading.Timer(PATIENCE_S, process.kill)
        late.start()
        try:
            told = ""
            for line in process.stdout or ():
                found = msgspec.json.decode(line, type=dict[str, int])
                progress("compiling kernels", found["done"], found["total"])
                told = f"{found['done']} of {found['total']} kernels"
        except msgspec.DecodeError:
            told = "no sense"
        finally:
            late.cancel()
            self.end()
        log.debug("Kernels compiled ahead: %s.", told or "none")

    def end(self) -> None:
        """Stop what still runs."""
        process, self.process = self.process, None
        if process is not None:
            _let_go(process)

    def keep(self) -> None:
        """The engine is built, so that the next start will find every kernel."""
        if self.mark is None:
            return
        with contextlib.suppress(OSError):
            self.mark.parent.mkdir(parents=True, exist_ok=True)
            self.mark.touch()


def wait_in_the_wings() -> subprocess.Popen[bytes] | None:
    """The process, before it is known what there is to rehearse: its imports take as long as the engine's own. None where
    a start has succeeded before, and so most probably needs none."""
    return None if _processes() < LEAST_PROCESSES or marks().exists() else _started()


def dismiss(waiting: subprocess.Popen[bytes] | None) -> None:
    """End a process that nobody has let begin; another one has ended already."""
    if waiting is not None:
        waiting.kill()
        _let_go(waiting)


def begin(
    options: EngineOptions,
    facts: Hardware,
    capability: int,
    wanted: bool = True,
    waiting: subprocess.Popen[bytes] | None = None,
) -> Rehearsal:
    """Let the process that is ``waiting``, or a new one, begin, if it is wanted and would bring something."""
    if not wanted or facts.kind != "cuda":
        dismiss(waiting)
        return Rehearsal()
    mark, processes = mark_of(options, facts), _processes()
    if processes < LEAST_PROCESSES or mark.exists():
        dismiss(waiting)
        return Rehearsal(mark)
    process = waiting or _started()
    if process is None or process.stdin is None:
        return Rehearsal(mark)
    try:
        process.stdin.write(msgspec.json.encode(Play(options, facts, capability, processes)) + b"\n")
        process.stdin.flush()
    except OSError as problem:  # it has ended; ``wait`` will find that out
        log.debug("Compiling kernels ahead: %s", problem)
    return Rehearsal(mark, process)


def _let_go(process: subprocess.Popen[bytes]) -> None:
    """Of one that ends, or has ended."""
    end_child(process, END_S)
    if process.stdout is not None:
        process.stdout.close()


def _started() -> subprocess.Popen[bytes] | None:
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(COMMAND, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
    except OSError as problem:
        log.debug("Compiling kernels ahead: %s", problem)
        return None


def _processes() -> int:
    """How many can compile at a time."""
    return min(MOST_PROCESSES, usable_cores() - 1, available_bytes()[0] // 2 // PROCESS_BYTES)


def mark_of(options: EngineOptions, facts: Hardware) -> Path:
    """Beside Triton's cache, named by all that decides which kernels a start needs."""
    told = hashlib.sha256(msgspec.json.encode([options, facts.name, __version__, sys.version, _triton()]))
    for path in sorted(KERNELS.glob("*.py")):
        told.update(path.read_bytes())
    return marks() / told.hexdigest()[:32]


def marks() -> Path:
    """The folder of the marks, where Triton keeps machine code."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    return Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache") / "octavo"


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""
