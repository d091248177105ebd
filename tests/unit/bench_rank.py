"""A rank of a measurement that measures nothing: leaves a file, or fails, or waits for ever."""

from __future__ import annotations

import sys
import time
from pathlib import Path

if __name__ == "__main__":
    what, folder, _, meeting, _, rank = sys.argv[1:]
    Path(folder, f"rank{rank}").write_text(meeting)
    if what == "fail" and rank == "1":
        raise SystemExit(3)
    while what == "fail":
        time.sleep(0.1)
