"""A start with an empty cache of kernels: what it launches was all found and compiled ahead by the rehearsal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_compile import CONFIG

pytestmark = pytest.mark.gpu

SCRIPT = """
import json, sys
from pathlib import Path
import triton
from test_compile import engine
missed = []
triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: cache_hit or missed.append(src.name)
engine(Path(sys.argv[1]), 2048, sys.argv[2] or None, False, json.loads(sys.argv[3]))
print(json.dumps(missed))
"""
WINDOWS = {
    **CONFIG,
    "model_type": "gemma3_text",
    "num_hidden_layers": 6,
    "sliding_window": 512,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"],
}


@pytest.mark.parametrize(
    ("quantization", "config"), [("", CONFIG), ("fp8", CONFIG), ("int4", CONFIG), ("", WINDOWS)]
)
def test_nothing_is_left_to_compile(quantization: str, config: dict[str, object], tmp_path: Path) -> None:
    here = Path(__file__).parent
    paths = [str(here), str(here.parent / "models"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), quantization, json.dumps(config)],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert len(list((tmp_path / "cache").rglob("*.cubin"))) > 20
