"""The name of a compiled kernel does not depend on what was launched before it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from uninterpreted import environment

pytest.importorskip("triton")

SCRIPT = """
import sys
from octavo.device.kernels.keys import helpers_first
from octavo.device.kernels.triton import attention, draw, fragments, moe_packed
import triton
helpers_first()
names = {}
for part in sys.argv[1].split():
    module, kernel = part.split(".")
    triton.knobs.runtime.jit_cache_hook(fn=type("Info", (), {"jit_function": getattr(globals()[module], kernel)}))
    names[part] = getattr(globals()[module], kernel).cache_key
print(sorted(names.items()))
"""
KERNELS = "draw._scan_kernel draw._settle_kernel attention._decode_kernel attention._merge_kernel fragments._few_kernel"


def test_names_are_the_same_in_any_order(tmp_path: Path) -> None:
    orders = (KERNELS, " ".join(reversed(KERNELS.split())))
    told = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT, order],
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for order in orders
    ]
    assert told[0] == told[1]
    assert told[0].count("_kernel") == len(KERNELS.split())
