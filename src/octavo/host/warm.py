"""Compiles kernels into the cache and ends: ``python -m octavo.host.warm NAME ...``, beside a process that serves."""

from __future__ import annotations

import os
import sys

from octavo.device.kernels.numba.library import KernelLibrary
from octavo.engine.process import live_with_parent

POLITENESS = 5  # steps of niceness: the answers that run meanwhile go first


def main(names: list[str]) -> int:
    """Warm the named kernels."""
    live_with_parent()
    if hasattr(os, "nice"):
        os.nice(POLITENESS)
    KernelLibrary().warm(names)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
