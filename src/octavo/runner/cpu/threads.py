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
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from octavo.device.kernels.numba import team
from octavo.device.kernels.numba.library import KernelLibrary
from octavo.runner.cpu.program import Tape

CGROUP = Path("/sys/fs/cgroup")
CPUS = Path("/sys/devices/system/cpu")
FUTEX_NUMBERS = {"x86_64": 202, "aarch64": 98}


def available_threads() -> int:
    """Cores this process may use: its affinity mask without second hyperthreads (they share the multipliers), cut to the
    cgroup's CPU quota (rounded up, at least 1)."""
    if hasattr(os, "sched_getaffinity"):
        cores = physical_cores(os.sched_getaffinity(0), CPUS)
    else:
        cores = os.cpu_count() or 1
    quota = cgroup_quota(CGROUP)
    return max(1, min(cores, math.ceil(quota))) if quota else max(1, cores)


def physical_cores(logical: set[int], root: Path) -> int:
    """How many different cores some logical processors lie on; each counts as one where the system does not say."""
    cores = set()
    for index in logical:
        try:
            cores.add((root / f"cpu{index}" / "topology" / "thread_siblings_list").read_text())
        except OSError:
            cores.add(str(index))
    return len(cores)


def cgroup_quota(root: Path) -> float | None:
    """CPUs the control group grants (versions 2 and 1), or None where it sets no limit."""
    try:
        text = (root / "cpu.max").read_text().split()
        return None if text[0] == "max" else int(text[0]) / int(text[1])
    except (OSError, ValueError, IndexError, ZeroDivisionError):
        pass
    try:
        quota = int((root / "cpu" / "cpu.cfs_quota_us").read_text())
        period = int((root / "cpu" / "cpu.cfs_period_us").read_text())
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
    again. Results do not depend on the number of threads.
    """

    NAP_S = 1e-4  # what a nap takes, with the system's timer slack
    CROWDED = 0.2  # share of a run spent napping from which on fewer threads are better
    PATIENCE = 64  # runs with fewer threads before the next attempt with all

    def __init__(self, threads: int, library: KernelLibrary) -> None:
        self.threads = self.active = min(threads, team.MEMBERS - 1)
        self._retry_in = 0
        self.watch: Watch | None = None
        self._run, self._work = library.execute()
        self._lines = np.zeros((team.TICKS + 1) * 8 + 8, np.int64)
        self._control = -(-self._lines.ctypes.data // team.LINE) * team.LINE
        self._first = (self._control - self._lines.ctypes.data) // 8
        self._system = system_calls()
        self._calls = int(self._system.ctypes.data)
        self._helpers = [
            threading.Thread(
                target=self._work,
                args=(self._control, self._system.ctypes.data, index),
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
        self._adapt((self.naps - naps) * self.NAP_S / max(self.active, 1), time.perf_counter() - start)

    def _adapt(self, napped_s: float, elapsed_s: float) -> None:
        """Choose how many threads the next run uses."""
        if self.active > 1 and napped_s > self.CROWDED * elapsed_s:
            self.active -= 1
            self._retry_in = self.PATIENCE
        elif self.active < self.threads:
            self._retry_in -= 1
            if self._retry_in <= 0:
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
