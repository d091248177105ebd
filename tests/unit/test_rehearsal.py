"""The engine's side of a rehearsed start: whatever the other process does, the start goes on."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from octavo.config import EngineOptions, Hardware
from octavo.device.platform.rehearsal import Answers, RehearsalPlatform
from octavo.host import rehearsal

CARD = Hardware("cuda", "a card", 80 << 30, 16, True)
READ = "import sys; sys.stdin.readline(); "


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(rehearsal, "usable_cores", lambda: 8)
    monkeypatch.setattr(rehearsal, "available_bytes", lambda: (64 << 30, 64 << 30))


def other(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(rehearsal, "COMMAND", (sys.executable, "-c", code))


def waited(options: EngineOptions | None = None) -> list[tuple[str, int, int]]:
    told: list[tuple[str, int, int]] = []
    with rehearsal.begin(options or EngineOptions(), CARD, 90) as begun:
        process = begun.process
        assert process is not None
        begun.wait(lambda phase, done, total: told.append((phase, done, total)))
        assert begun.process is None
    assert process.returncode is not None and process.stdin is not None and process.stdin.closed
    return told


def test_progress_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    other(monkeypatch, READ + """[print('{"done": %d, "total": 2}' % n) for n in (1, 2)]""")
    assert waited() == [("compiling kernels", 1, 2), ("compiling kernels", 2, 2)]


@pytest.mark.parametrize(
    "code", ["raise SystemExit(3)", READ + "print('Traceback')", READ, "import os; os.abort()"]
)
def test_a_process_that_fails_is_no_failure_of_the_start(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other(monkeypatch, code)
    assert waited() == []


def test_one_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    other(monkeypatch, READ + "import time; time.sleep(600)")
    monkeypatch.setattr(rehearsal, "PATIENCE_S", 0.2)
    assert waited() == []


def test_a_start_that_fails_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    other(monkeypatch, "import sys; sys.stdin.read()")  # as the real one: until its input ends
    begun = rehearsal.begin(EngineOptions(), CARD, 90)
    process = begun.process
    assert process is not None
    with pytest.raises(ValueError, match="weights"), begun:
        raise ValueError("weights")
    assert process.returncode == -9


def test_a_start_that_succeeded_is_remembered_by_what_decides_it() -> None:
    options = EngineOptions()
    begun = rehearsal.Rehearsal(rehearsal.mark_of(options, CARD))
    begun.keep()
    assert rehearsal.begin(options, CARD, 90).process is None
    other_model = replace(options, model=replace(options.model, quantization="fp8"))
    for mark in (
        rehearsal.mark_of(other_model, CARD),
        rehearsal.mark_of(options, replace(CARD, name="another")),
    ):
        assert not mark.exists()


@pytest.mark.parametrize("why", ["cpu", "cores", "memory", "unwanted"])
def test_none_where_it_brings_nothing(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "cores":
        monkeypatch.setattr(rehearsal, "usable_cores", lambda: 2)
    if why == "memory":
        monkeypatch.setattr(rehearsal, "available_bytes", lambda: (1 << 30, 64 << 30))
    card = replace(CARD, kind="cpu") if why == "cpu" else CARD
    begun = rehearsal.begin(EngineOptions(), card, 90, wanted=why != "unwanted")
    assert begun.process is None
    begun.wait(lambda *_: pytest.fail("there is nothing to tell"))
    begun.keep()
    assert rehearsal.marks().exists() == (
        why in ("cores", "memory")
    )  # its own kernels are compiled all the same


def test_what_the_host_reads_from_a_card_without_memory_is_zero() -> None:
    platform = RehearsalPlatform(CARD, 90)
    x = torch.ones(3, 4, device=platform.device)
    with Answers():  # type: ignore[no-untyped-call]
        assert int(x.sum()) == 0
        assert x.to("cpu", torch.int32).tolist() == [[0] * 4] * 3
        assert platform.host_buffer(12, torch.float32).fill_(7).copy_(x.view(-1)).tolist() == [0.0] * 12
        assert (x @ x.T).shape == (3, 3)


def test_a_process_that_waits_from_the_start_on_is_the_one_that_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other(monkeypatch, READ + """print('{"done": 1, "total": 1}')""")
    waiting = rehearsal.wait_in_the_wings()
    assert waiting is not None
    begun = rehearsal.begin(EngineOptions(), CARD, 90, waiting=waiting)
    assert begun.process is waiting
    begun.wait(lambda *_: None)
    begun.keep()
    assert rehearsal.wait_in_the_wings() is None


def test_one_that_waited_for_nothing_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    other(monkeypatch, READ)
    waiting = rehearsal.wait_in_the_wings()
    assert waiting is not None
    assert rehearsal.begin(EngineOptions(), CARD, 90, wanted=False, waiting=waiting).process is None
    assert waiting.returncode is not None
