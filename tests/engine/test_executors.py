"""Executors: the same answers inline and in worker processes, and workers that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import VOCAB, expected, make_runner, request

from octavo.engine.core import EngineCore
from octavo.engine.executor.base import Executor, Seat
from octavo.engine.executor.crew import Crew
from octavo.engine.executor.inline import InlineExecutor
from octavo.engine.executor.multiproc import MultiprocExecutor
from octavo.engine.executor.node import Agent, NodeHello, accept_nodes, dial, listen
from octavo.engine.executor.null import NullRunner
from octavo.engine.executor.pulse import Allowance
from octavo.engine.settings import EngineSettings
from octavo.errors import EngineDeadError, ModelNotFoundError, OctavoError
from octavo.protocol.generate import GenerateRequest, SamplingParams
from octavo.protocol.plan import SlotInit

HERE = str(Path(__file__).parent)
SEAT = Seat(0, 1, 0, 1, "", lambda phase, done, total: None)


@pytest.fixture(autouse=True)
def helpers_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", HERE, prepend=os.pathsep)


def multiproc(num_workers: int = 1, **arguments: Any) -> MultiprocExecutor:
    return MultiprocExecutor("engines:make_runner", arguments, crew=Crew(num_workers))


def core_over(executor: Executor, overlap: bool = False) -> EngineCore:
    settings = EngineSettings(
        max_model_len=256, max_num_seqs=8, max_num_batched_tokens=64, vocab_size=VOCAB, overlap=overlap
    )
    return EngineCore(executor, settings)


def finish(core: EngineCore, requests: list[GenerateRequest]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {req.id: [] for req in requests}
    for req in requests:
        core.submit(req)
    while core.has_work:
        for delta in core.step():
            tokens[delta.id] += delta.tokens
    return tokens


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_gone(pids: Iterator[int] | list[int]) -> None:
    end = time.monotonic() + 10
    for pid in pids:
        while not gone(pid):
            assert time.monotonic() < end, f"process {pid} is still there"
            time.sleep(0.01)


@pytest.mark.parametrize("overlap", [False, True])
def test_two_workers_answer_like_one_inline(overlap: bool) -> None:
    requests = [request(i, prompt=[1 + i] * (5 + 20 * i), max_tokens=12) for i in range(6)]
    executor = multiproc(2)
    pids = executor.pids
    core = core_over(executor, overlap)
    inline = core_over(InlineExecutor(make_runner({}, SEAT).runner), overlap)
    assert executor.layout == inline.executor.layout
    assert executor.num_pages == 64  # the least of 64 and 65
    answers = finish(core, requests)
    assert answers == finish(inline, requests) == {req.id: expected(req) for req in requests}
    core.check()
    core.close()
    core.close()
    wait_gone(pids)


def test_a_large_plan_passes_the_pipe() -> None:
    executor = multiproc(1)
    core = core_over(executor)
    init = SlotInit(0, list(range(400_000)), 400_000, SamplingParams(), 0, [])
    core.submit(request(1))
    step = core.scheduler.schedule()
    assert step is not None
    step.plan.admits.append(init)
    executor.forward(step.plan)
    executor.sample([])
    assert executor.collect().step == step.plan.step
    executor.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_is_an_engine_dead_error(rank: int) -> None:
    executor = multiproc(2)
    core = core_over(executor)
    core.submit(request(1, max_tokens=200))
    for _ in range(3):
        core.step()
    os.kill(executor.pids[rank], signal.SIGKILL)
    with pytest.raises(EngineDeadError, match=f"Worker {rank} has ended with status -9"):
        for _ in range(150):
            core.step()
            time.sleep(0.01)  # null workers run apart; those that compute together cannot
    pids = executor.pids
    core.close()
    wait_gone(pids)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failing_worker_says_why(rank: int) -> None:
    executor = multiproc(2, fail_rank=rank, fail_at=4)
    core = core_over(executor)
    core.submit(request(1, max_tokens=200))
    with pytest.raises(EngineDeadError, match=f"Worker {rank} failed: RuntimeError: the device fell over"):
        for _ in range(150):
            core.step()
            time.sleep(0.01)  # null workers run apart; those that compute together cannot
    core.close()


def test_a_failed_start_keeps_its_error_and_leaves_nobody() -> None:
    # Rank 0 never gets ready: the failure of rank 1 must be seen all the same.
    with pytest.raises(ModelNotFoundError, match="There is no model"):
        multiproc(2, fail_start_of=1, hang_start_of=0)
    with pytest.raises(OctavoError, match="names no runner factory"):
        MultiprocExecutor("engines:nothing", {}, crew=Crew(1))


def test_what_a_worker_tells_reaches_the_owner() -> None:
    told: list[tuple[str, int, int]] = []
    executor = MultiprocExecutor(
        "engines:make_runner", {}, crew=Crew(2), progress=lambda *report: told.append(report)
    )
    folder = Path(executor._crew.folder)
    assert executor.facts == b"facts of the null engine"
    assert ("waking up", 1, 1) in told
    assert folder.stat().st_mode & 0o777 == 0o700
    executor.close()
    assert not folder.exists()


def test_a_rank_that_hangs_at_start_is_named() -> None:
    with pytest.raises(EngineDeadError, match=r"nothing was heard for 2 s \(rank 1 since waking up\)"):
        MultiprocExecutor("engines:make_runner", {"hang_start_of": 1}, crew=Crew(2), silence_s=2.0)


def hung_core() -> tuple[EngineCore, MultiprocExecutor]:
    """Two null workers behind an engine that has begun a request, and that notices a hang after a second."""
    executor = MultiprocExecutor(
        "engines:make_runner", {"slow_at": 5}, crew=Crew(2), silence_s=1.5, step_s=1.5
    )
    core = core_over(executor)
    core.submit(request(1, max_tokens=200))
    core.step()
    return core, executor


def test_a_stopped_rank_is_named_while_the_engine_idles() -> None:
    core, executor = hung_core()
    pids = executor.pids
    os.kill(pids[1], signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(EngineDeadError, match=r"^Worker 1: no sign of life for 1.5 s"):
        while time.monotonic() - began < 10:
            core.executor.watch()
            time.sleep(0.1)
    core.close()
    wait_gone(pids)


def test_a_stopped_rank_that_must_answer_is_named() -> None:
    core, executor = hung_core()
    pids = executor.pids
    os.kill(pids[0], signal.SIGSTOP)
    with pytest.raises(EngineDeadError, match=r"^Worker 0: no sign of life for 1.5 s.*execute-model-timeout"):
        core.step()
    core.close()
    wait_gone(pids)


def test_a_step_that_never_ends_is_no_life() -> None:
    """Both workers beat, but the device of one hangs at the fifth step."""
    core, executor = hung_core()
    pids = executor.pids
    with pytest.raises(EngineDeadError, match="No worker has answered for 4 s, though all run"):
        for _ in range(10):
            core.step()
    core.close()
    wait_gone(pids)


def test_a_rank_that_stops_while_it_starts_is_named() -> None:
    crew = Crew(2)
    pids = [worker.process.pid for worker in crew.workers]

    def stop(phase: str, done: int, total: int) -> None:
        os.kill(pids[1], signal.SIGSTOP)

    with pytest.raises(
        EngineDeadError, match=r"^Worker 1 in phase '(waking up|the start)': no sign of life for 1.5 s"
    ):
        MultiprocExecutor("engines:make_runner", {"hang_start_of": 1}, crew=crew, step_s=0.5, progress=stop)
    wait_gone(pids)


def two_machines(step_s: float = 1.5) -> tuple[MultiprocExecutor, threading.Thread, Crew]:
    """An executor with a null worker here and one behind an agent, which a thread plays."""
    listener = listen("127.0.0.1", 0)
    crew = Crew(1, 1)
    crew.build("engines:make_runner", {}, 2)
    connection = dial("127.0.0.1", listener.getsockname()[1], NodeHello(1, [1], "plan"), 5)
    thread = threading.Thread(target=Agent(connection, crew, step_s).run)
    thread.start()
    executor = MultiprocExecutor(
        "engines:make_runner",
        {},
        crew=Crew(1),
        num_ranks=2,
        nodes=lambda check: accept_nodes(listener, 1, "plan", check, limit_s=5.0),
        step_s=step_s,
    )
    return executor, thread, crew


def test_a_stopped_rank_of_another_machine_is_named() -> None:
    executor, thread, crew = two_machines()
    core = core_over(executor)
    pids = [*executor.pids, crew.workers[0].process.pid]
    assert finish(core, [request(1)]) == {1: expected(request(1))}
    os.kill(pids[1], signal.SIGSTOP)
    end = time.monotonic() + 8
    with pytest.raises(EngineDeadError, match=r"^Worker 1 failed: No sign of life for 1.5 s"):
        while time.monotonic() < end:
            core.executor.watch()
            time.sleep(0.1)
    core.close()
    thread.join(10)
    wait_gone(pids)


def test_a_machine_that_says_nothing_is_named() -> None:
    listener = listen("127.0.0.1", 0)
    silent = dial("127.0.0.1", listener.getsockname()[1], NodeHello(1, [1, 2], "plan"), 5)
    with pytest.raises(EngineDeadError, match=r"^The machine of worker 1, 2 in phase 'the start': no sign"):
        MultiprocExecutor(
            "engines:make_runner",
            {},
            crew=Crew(1),
            num_ranks=3,
            nodes=lambda check: accept_nodes(listener, 1, "plan", check),
            step_s=0.5,
        )
    silent.close()


def test_what_a_step_may_take_follows_those_before() -> None:
    allowance = Allowance(20.0, 300.0)
    assert allowance.seconds(1) == 300.0  # nothing is known
    allowance.observe(1, 0.05)
    assert allowance.seconds(1) == 20.0
    assert allowance.seconds(512) == pytest.approx(256.0)  # as if every token took a step of its own
    allowance.observe(512, 4.0)
    assert allowance.seconds(512) == pytest.approx(40.0)
    assert allowance.seconds(8192) == 300.0
    for _ in range(100):
        allowance.observe(1, 0.05)
    assert allowance.seconds(1) == 20.0


def test_workers_die_with_their_parent() -> None:
    code = (
        "import os\n"
        "from octavo.engine.executor.crew import Crew\n"
        "from octavo.engine.executor.multiproc import MultiprocExecutor\n"
        "executor = MultiprocExecutor('engines:make_runner', {}, crew=Crew(2))\n"
        "print(*executor.pids, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    parent = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    pids = [int(pid) for pid in parent.stdout.split()]
    assert len(pids) == 2
    wait_gone(pids)


def test_null_runner_ends_sequences_at_the_eos_rate() -> None:
    runner = NullRunner(
        make_runner({}, SEAT).runner.layout, num_pages=64, num_slots=8, vocab_size=VOCAB, eos_rate=0.1
    )
    core = core_over(InlineExecutor(runner))
    requests = [
        GenerateRequest(
            id=i,
            prompt_token_ids=[1, 2, 3],
            sampling=SamplingParams(max_tokens=100, seed=i),
            eos_token_ids=[VOCAB - 1],
        )
        for i in range(100)
    ]
    answers = finish(core, requests)
    lengths = [len(tokens) for tokens in answers.values()]
    assert 5 < sum(lengths) / len(lengths) < 15  # geometric with mean 10
    assert all(tokens[-1] == VOCAB - 1 for tokens in answers.values() if len(tokens) < 100)


def test_null_runner_with_drafts_and_a_script() -> None:
    runner = NullRunner(
        make_runner({}, SEAT).runner.layout,
        num_pages=64,
        num_slots=8,
        vocab_size=VOCAB,
        num_drafts=3,
        script=lambda init, position: (init.seed * 100 + position) % VOCAB,
    )
    core = core_over(InlineExecutor(runner), overlap=True)
    answers = finish(core, [request(i, prompt=[7] * 10, max_tokens=40) for i in range(4)])
    assert answers == {i: [(i * 100 + 10 + k) % VOCAB for k in range(40)] for i in range(4)}
    stats = core.stats()
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
