"""GPU tests skip, visibly, where there is no CUDA device; results of the parity test go to a file where one is named."""

from __future__ import annotations

import fcntl
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "models"))  # what drives a network by hand


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parity-json",
        type=Path,
        help="write how near bfloat16 is for each family (tests/gpu/bf16_parity.json)",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def parity_results(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Family -> what was measured; processes that share the tests each add theirs to the file."""
    found: dict[str, Any] = {}
    yield found
    path: Path | None = request.config.getoption("--parity-json")
    if path is None or not found:
        return
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        before = json.loads(path.read_text()) if path.exists() else {}
        same = all(before.get(key) == value for key, value in made.items())
        families = {**(before.get("families", {}) if same else {}), **found}
        path.write_text(json.dumps({**made, "families": families}, indent=1, sort_keys=True) + "\n")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Triton compiles while the test runs: kernels and what they are compiled for. ``clear`` it to begin later."""
    triton = pytest.importorskip("triton")
    found: list[str] = []

    def note(**info: Any) -> None:
        found.append(f"{info['repr'].partition('[')[0]} {info['key']}")

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    return found
