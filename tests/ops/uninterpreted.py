"""The environment of a script that uses Triton's compiler, while tests around it use the interpreter."""

from __future__ import annotations

import os
from pathlib import Path


def environment(cache: Path) -> dict[str, str]:
    """This process's, with a cache of kernels of its own."""
    changed = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1"}
    changed.pop("TRITON_INTERPRET", None)
    return changed
