"""Threads of a tape: order, oversubscription, sleeping, and the kernel cache surviving a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from octavo.device.kernels.numba.library import KERNELS, KernelLibrary
from octavo.runner.cpu import threads
from octavo.runner.cpu.program import Program, float_bits
from octavo.runner.cpu.threads import (
    Team,
    available_threads,
    cgroup_quota,
    home_node,
    parse_list,
    physical_cores,
)

LIBRARY = KernelLibrary()


class Ladder:
    """A tape whose every instruction reads rows that another thread wrote in the one before: x[n+1] = norm(x[n] upside down)."""

    def __init__(self, rungs: int = 40) -> None:
        self.program, rng = Program(LIBRARY), np.random.default_rng(0)
        self.values = rng.standard_normal((rungs + 1, 37, 64)).astype(np.float32)
        self.start = self.values.copy()
        weight, count, order = (
            rng.uniform(0.9, 1.1, 64).astype(np.float32),
            np.array([37]),
            np.arange(37)[::-1].copy(),
        )
        self.program.keep += [weight, count, order]
        for rung in range(rungs):
            source, target = self.values[rung].ctypes.data, self.values[rung + 1].ctypes.data
            shape = [weight.ctypes.data, 64, float_bits(1e-6)]
            self.program.add("norm", [count.ctypes.data, source, order.ctypes.data, *shape, target, 0, 0])
        self.tape = self.program.tape()

    def reset(self) -> None:
        self.values[:] = self.start


def test_every_thread_count_gives_the_same_numbers() -> None:
    """Up to eight threads on however few cores there are: slower, never wrong, never stuck."""
    ladder, results = Ladder(), []
    for count in (1, 2, 3, 8):
        team = Team(count, LIBRARY)
        for _ in range(5):
            ladder.reset()
            team.run(ladder.tape)
            results.append(ladder.values.copy())
        team.close()
    assert all(np.array_equal(results[0], result) for result in results)


def test_two_teams_at_once() -> None:
    """Two engines with more threads than cores between them."""
    ladders, errors = [Ladder(), Ladder()], []
    want = Ladder()
    alone = Team(1, LIBRARY)
    alone.run(want.tape)

    def drive(ladder: Ladder) -> None:
        team = Team(4, LIBRARY)
        for _ in range(10):
            ladder.reset()
            team.run(ladder.tape)
            if not np.array_equal(ladder.values, want.values):
                errors.append("wrong numbers")
        team.close()

    drivers = [threading.Thread(target=drive, args=(ladder,)) for ladder in ladders]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(timeout=120)
        assert not driver.is_alive()
    assert not errors
    alone.close()


def test_an_idle_team_sleeps_and_wakes() -> None:
    ladder = Ladder(4)
    team = Team(3, LIBRARY)
    team.run(ladder.tape)
    time.sleep(0.05)  # the helpers have stopped spinning by now
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.15  # two spinning helpers would have used 0.3 s or more
    ladder.reset()
    team.run(ladder.tape)
    team.close()
    assert not any(
        thread.name.startswith("octavo-cpu") for thread in threading.enumerate() if thread.is_alive()
    )


def test_a_crowded_team_shrinks_and_tries_again() -> None:
    ladder, team = Ladder(2), Team(3, LIBRARY)
    for napped, active in ((0.0, 3), (0.5, 2), (0.05, 2), (0.5, 1), (0.9, 1)):
        team._adapt(napped, 1.0, now=10.0)
        assert team.active == active
    pause = team._retry_at - 10.0
    assert pause == pytest.approx(2 * team.FIRST_PAUSE_S)
    team._adapt(0.0, 1.0, now=10.0 + 0.9 * pause)
    assert team.active == 1
    team._adapt(0.0, 1.0, now=10.1 + pause)
    assert team.active == 3
    for _ in range(12):  # crowded at every attempt
        team._adapt(0.5, 1.0, now=20.0)
        team.active = 3
    assert team._retry_at == 20.0 + team.LONGEST_PAUSE_S
    team._adapt(0.0, 1.0, now=30.0)
    team._adapt(0.5, 1.0, now=40.0)
    assert team._retry_at == pytest.approx(40.0 + team.FIRST_PAUSE_S)
    team.active = 2  # the third helper sleeps through this run and is there for the next
    team.run(ladder.tape)
    team.active = 3
    ladder.reset()
    team.run(ladder.tape)
    team.close()


def test_the_number_of_members_may_change_from_run_to_run() -> None:
    """Helpers that sleep through a generation never mistake the next one for it."""
    ladder, want, rng = Ladder(3), Ladder(3), np.random.default_rng(0)
    team, alone = Team(5, LIBRARY), Team(1, LIBRARY)
    alone.run(want.tape)
    for _ in range(400):
        ladder.reset()
        team.active = int(rng.integers(1, 6))
        team.run(ladder.tape)
        assert np.array_equal(ladder.values, want.values)
    team.close()


def test_a_team_that_is_dropped_stops_its_helpers() -> None:
    team = Team(2, LIBRARY)
    helper = team._helpers[0]
    del team
    helper.join(timeout=30)
    assert not helper.is_alive()


def test_thread_count_follows_the_control_group(tmp_path: Path) -> None:
    assert cgroup_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cgroup_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cgroup_quota(tmp_path) == 1.5
    service = tmp_path / "system.slice" / "octavo.service"  # where no namespace hides what lies above
    service.mkdir(parents=True)
    (service / "cpu.max").write_text("120000 100000\n")
    (service.parent / "cpu.max").write_text("max 100000\n")
    assert cgroup_quota(tmp_path, "/system.slice/octavo.service") == 1.2
    (service / "cpu.max").write_text("900000 100000\n")
    assert cgroup_quota(tmp_path, "/system.slice/octavo.service") == 1.5
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("200000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_quota(tmp_path) == 2.0
    for index, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        (tmp_path / f"cpu{index}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{index}" / "topology" / "thread_siblings_list").write_text(siblings)
    assert physical_cores({0, 1, 2, 3}, tmp_path) == 2
    assert physical_cores({2, 9}, tmp_path) == 2  # 9 is unknown: a core of its own
    assert 1 <= available_threads() <= (os.cpu_count() or 1)


def test_threads_stay_on_one_memory_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_list("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11} and parse_list("\n") == set()
    assert home_node({0, 1}, tmp_path) == {0, 1}
    for index, text in enumerate(["0-3", "4-11", ""]):
        (tmp_path / f"node{index}").mkdir()
        (tmp_path / f"node{index}" / "cpulist").write_text(text + "\n")
    assert home_node(set(range(12)), tmp_path) == set(range(4, 12))
    assert home_node({0, 1, 2, 5}, tmp_path) == {0, 1, 2}
    assert home_node({40, 41}, tmp_path) == {40, 41}
    monkeypatch.setattr(threads, "NODES", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    assert threads.available_threads() <= 8
    assert threads.binding(2) == set(range(4, 12)) and threads.binding(9) is None
    bound: list[set[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: bound.append(cpus))
    ladder, team = Ladder(2), Team(3, LIBRARY)
    team.run(ladder.tape)
    team.close()
    assert bound == [set(range(4, 12))] * 2


def test_a_kill_while_warming_leaves_a_usable_cache(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from octavo.device.kernels.numba.library import KernelLibrary\n"
        "KernelLibrary(pathlib.Path(sys.argv[1])).warm(['norm', 'gate', 'add_norm'],"
        " lambda done, total: print(done, total, flush=True))"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    while child.stdout.readline().split()[0] != "2":  # two kernels are on disk, the third is being built
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    library = KernelLibrary(tmp_path)
    library.warm(["norm", "gate", "add_norm"])
    assert all(library.address(name) for name in ("norm", "gate", "add_norm"))


def test_compiled_kernels_load_without_the_compiler() -> None:
    """Importing Numba takes longer than everything else at the start of ``octavo run``."""
    LIBRARY.warm(["norm"])
    script = (
        "import sys; from octavo.host import compiled_engine; from octavo.device.kernels.numba.library import KernelLibrary\n"
        "library = KernelLibrary(); assert library.missing(['norm']) == []\n"
        "assert library.address('norm') and library.execute()\n"
        "print(sorted({'numba', 'torch'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_old_kernel_folders_go_and_other_things_stay(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"znver4-{number:016x}").mkdir()
        os.utime(tmp_path / f"znver4-{number:016x}", (number, number))
    (tmp_path / "notes").mkdir()
    current = KernelLibrary(tmp_path).folder
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"notes", current.name, *(f"znver4-{number:016x}" for number in (3, 4, 5))}
    assert current.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_written_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    library = KernelLibrary(tmp_path / "file")
    assert library.folder.is_dir() and library.address("norm")


def test_every_kernel_is_known_by_name() -> None:
    assert all(LIBRARY.address(name) for name in KERNELS)
