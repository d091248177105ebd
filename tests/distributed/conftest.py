"""Lets the tests of this folder import their helpers, and the tiny models of the parity tests, by name; their workers are
forked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from octavo.engine.executor import crew

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent / "models"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from forked import ForkedWorker
from service import add_tokenizer
from test_parity import oracle


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random checkpoint of the family that the module's ``FAMILY`` names."""
    folder = tmp_path_factory.mktemp(request.module.FAMILY)
    oracle(request.module.FAMILY, folder)
    add_tokenizer(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def quick_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "start_process", ForkedWorker)
