"""Lets the tests of this folder import their helpers, and the tiny models of the parity tests, by name."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent / "models"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
