"""Kernels become machine code for real GPUs, and fit their shared memory; the interpreter would not notice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from uninterpreted import environment

pytest.importorskip("triton")
SHARED = {90: 227 << 10, 86: 99 << 10}
LAST_SUM = 16 << 10  # over the warps of a product of few tokens; see ``BACK`` in triton/fragments.py


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize(("group", "least"), [("dense", 6), ("chosen", 6), ("chunks", 2), ("codes", 3)])
def test_kernels_compile_without_a_gpu(group: str, least: int, arch: int, tmp_path: Path) -> None:
    script = Path(__file__).parent / "ahead.py"
    done = subprocess.run(
        [sys.executable, str(script), group, str(arch)],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) >= least
    assert [kernel for kernel in found if kernel["shared"] > SHARED[arch]] == []
    few = [kernel["shared"] for kernel in found if kernel["kernel"] == "_few_kernel"]
    assert max(few, default=0) <= LAST_SUM, (
        "codes go through shared memory: the compiler chose another layout"
    )
