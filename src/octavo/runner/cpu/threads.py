"""The helper threads of the compiled CPU path, and how many there should be."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from octavo.device.kernels.numba import shared as team
from octavo.device.kernels.numba.library import KernelLibrary
from octavo.runner.cpu.program import Tape

CGROUP = Path("/sys/fs/cgroup")
CPUS = Path("/sys/devices/system/cpu")
NODES = Path("/sys/devices/system/node")
FUTEX_NUMBERS = {"x86_64": 202, "aarch64": 98}


def available_threads() -> int:
    """Cores this process may use: those of its affinity mask on one memory node, without second hyperthreads (they share
    the multipliers), cut to the cgroup's CPU quota (rounded up, at least 1)."""
    if hasattr(os, "sched_getaffinity"):
        cores = physical_cores(home_node(os.sched_getaffinity(0), NODES), CPUS)
    else:
        cores = os.cpu_count() or 1
    quota = cgroup_quota(CGROUP, own_group())
    return max(1, min(cores, math.ceil(quota))) if quota else max(1, cores)


def home_node(logical: set[int], root: Path) -> set[int]:
    """Those of some logical processors that lie on one memory node, the one with most of them; all of them where the
    system knows no nodes. Weights are read by the threads that repacked them, so one node's memory serves all."""
    nodes = []
    for path in sorted(root.glob("node[0-9]*/cpulist")):
        try:
            nodes.append(logical & parse_list(path.read_text()))
        except (OSError, ValueError):
            return logical
    return max(nodes, key=len, default=logical) or logical


def parse_list(text: str) -> set[int]:
    """Numbers of a kernel list like "0-3,8"."""
    found: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return found


def binding(threads: int) -> set[int] | None:
    """Where helpers should stay: the home node, if there are others and it has a core for each; else anywhere."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    allowed = os.sched_getaffinity(0)
    home = home_node(allowed, NODES)
    return home if home != allowed and physical_cores(home, CPUS) >= threads else None


def physical_cores(logical: set[int], root: Path) -> int:
    """How many different cores some logical processors lie on; each counts as one where the system does not say."""
    cores = set()
    for index in logical:
        try:
            cores.add((root / f"cpu{index}" / "topology" / "thread_siblings_list").read_text())
        except OSError:
            cores.add(str(index))
    return len(cores)


def cgroup_quota(root: Path, group: str = "/") -> float | None:
    """CPUs that the control group ``group`` and those around it grant (versions 2 and 1), None where none sets a limit."""
    inner = root / group.strip("/")
    found = [_quota(path) for path in (inner, *inner.parents) if path == root or root in path.parents]
    limits = [quota for quota in found if quota is not None]
    return min(limits) if limits else None


def own_group() -> str:
    """This process's control group (version 2) below the root that it sees."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return "/"
    return next((line[3:] for line in lines if line.startswith("0::")), "/")


def _quota(folder: Path) -> float | None:
    try:
        text = (folder / "cpu.max").read_text().split()
        return None if text[0] == "max" else int(text[0]) / int(text[1])
    except (OSError, ValueError, IndexError, ZeroDivisionError):
        pass
    try:
        quota = int((folder / "cpu" / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu" / "cpu.cfs_period_us").read_text())
        return quota / period if quota > 0 and period > 0 else None
    except (OSError, ValueError):
        return None


def system_calls() -> NDArray[np.int64]:
    """Addresses of the C functions waiting threads call, in the order ``team`` expects."""
    table = np.zeros(3, np.int64)
    if sys.platform == "win32":
        kernel = ctypes.CDLL("kernel32")
        table[team.NAP] = _address(kernel.SwitchToThread)
        return table
    library = ctypes.CDLL(None)
    table[team.NAP] = _address(library.usleep)
    number = FUTEX_NUMBERS.get(platform.machine())
    if sys.platform == "linux" and number is not None:
        table[team.SYSCALL] = _address(library.syscall)
        table[team.FUTEX] = number
    return table


def _address(function: Callable[..., object]) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


Watch = Callable[[Tape, NDArray[np.int64], float], None]  # times as in ``team``, seconds in all


class Team:
    """``threads`` - 1 helpers that wait for tapes; the calling thread is the first member.

    ``run`` returns when the whole tape is done. Helpers spin for some tens of microseconds after a tape and then
    sleep, so an idle team costs nothing. Where others use the cores too, threads nap at barriers for one that does not
    run; when naps take a large share of the time, the next runs use one thread fewer, then the full team is tried
    again: soon at first, for a prompt's run takes as long as fifty of an answer, later and later while it stays
    crowded. Results do not depend on the number of threads.
    """

    NAP_S = 1e-4  # what a nap takes, with the system's timer slack
    CROWDED = 0.2  # share of a run spent napping from which on fewer threads are better
    FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0  # with fewer threads, before the next attempt with all

    def __init__(self, threads: int, library: KernelLibrary) -> None:
        self.threads = self.active = min(threads, team.MEMBERS - 1)
        self._retry_at, self._pause_s = 0.0, self.FIRST_PAUSE_S
        self.watch: Watch | None = None
        self._run, self._work = library.execute()
        self._lines = np.zeros((team.TICKS + 1) * 8 + 8, np.int64)
        self._control = -(-self._lines.ctypes.data // team.LINE) * team.LINE
        self._first = (self._control - self._lines.ctypes.data) // 8
        self._system = system_calls()
        self._calls = int(self._system.ctypes.data)
        home = binding(self.threads)
        self._helpers = [
            threading.Thread(
                target=_live,
                args=(home, self._work, self._control, self._calls, index),
                name=f"octavo-cpu-{index}",
                daemon=True,
            )
            for index in range(1, self.threads)
        ]
        for helper in self._helpers:
            helper.start()
        self._end = weakref.finalize(
            self, _stop, self._helpers, self._run, self._lines, self._control, self._system
        )

    def run(self, tape: Tape) -> None:
        """Execute a tape on all threads; ``watch`` is told the times of every instruction."""
        times = None
        if self.watch is not None:
            times = np.zeros((self.active, 1 + 2 * len(tape)), np.int64)
            self._lines[self._line(team.TICKS)] = times.ctypes.data
        naps, start = self.naps, time.perf_counter()
        self._run(self._control, self._calls, tape.address, len(tape), self.active)
        if self.watch is not None and times is not None:
            self._lines[self._line(team.TICKS)] = 0
            self.watch(tape, times, time.perf_counter() - start)
        now = time.perf_counter()
        self._adapt((self.naps - naps) * self.NAP_S / max(self.active, 1), now - start, now)

    def _adapt(self, napped_s: float, elapsed_s: float, now: float) -> None:
        """Choose how many threads the next run uses; ``now`` in seconds of any clock."""
        if self.active > 1 and napped_s > self.CROWDED * elapsed_s:
            self.active -= 1
            self._retry_at = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, self.LONGEST_PAUSE_S)
        elif self.active == self.threads:
            self._pause_s = self.FIRST_PAUSE_S
        elif now >= self._retry_at:
            self.active = self.threads

    @property
    def naps(self) -> int:
        """How often a waiting thread had to sleep: high where there are more threads than free cores."""
        return int(self._lines[self._first + team.NAPS * 8])

    def _line(self, entry: int) -> int:
        return self._first + entry * 8

    def close(self) -> None:
        """End the helpers; the team is unusable afterwards."""
        self._end()


def _live(home: set[int] | None, work: Callable[..., None], *arguments: int) -> None:
    """A helper's life, on its node."""
    if home is not None:
        with suppress(OSError):  # a container may forbid it
            os.sched_setaffinity(0, home)  # of this thread
    work(*arguments)


def _stop(
    helpers: list[threading.Thread],
    run: Callable[..., None],
    lines: NDArray[np.int64],
    control: int,
    system: NDArray[np.int64],
) -> None:
    if not helpers:
        return
    lines[(control - lines.ctypes.data) // 8 + team.STOP * 8] = 1
    # An empty tape starts a generation; helpers look at STOP first, so nobody will report it done: run alone.
    run(control, system.ctypes.data, 0, 0, -1)
    for helper in helpers:
        helper.join()
