"""Kernels compile, to machine code, for the oldest GPUs that run bfloat16: nothing in them needs a newer one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
OLDEST = 80
# Largest shared memory of a block before Hopper: that of Ada (8.9), below Ampere's 163 KiB. CUDA C programming guide,
# "technical specifications per compute capability".
SHARED = 99 << 10
AT_THE_END = 16 << 10  # what the sum over the warps of a product of few tokens takes


def test_kernels_compile_for_ampere_and_ada() -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "ahead.py"), str(OLDEST)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    launches = json.loads(done.stdout)["launches"]
    kernels = {launch["kernel"] for launch in launches}
    assert {"_few_kernel", "_tile_kernel", "_linear_kernel", "_varlen_kernel", "_decode_kernel"} <= kernels
    assert [launch for launch in launches if launch["shared"] > SHARED] == []
    few = [launch["shared"] for launch in launches if launch["kernel"] == "_few_kernel"]
    assert max(few) <= AT_THE_END, (
        "codes go through shared memory: the compiler has chosen another layout (BACK)"
    )
