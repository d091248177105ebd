"""The engine's own process: ``python -m octavo.host ADDRESS``."""

from __future__ import annotations

import sys

from octavo import host
from octavo.engine.client.serve import run_engine
from octavo.engine.core import EngineCore
from octavo.host.built import Progress


def build(raw: bytes, progress: Progress) -> EngineCore:
    """An engine from encoded options."""
    options = host.decode_options(raw)
    return host.build_core(options, host.open_files(options, progress), progress)


if __name__ == "__main__":
    sys.exit(run_engine(sys.argv[1], build))
