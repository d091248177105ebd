"""Helpers of other rooms of the tests, and the count of inputs that the fuzz tests tried."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
sys.path += [str(TESTS / room) for room in ("server", "engine", "files", "e2e")]
COUNT = "inputs"  # name of the property by which a test reports how many inputs it tried


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line: how many inputs were tried in all."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    counts = [[value for name, value in report.user_properties if name == COUNT] for report in reports]
    tried = [sum(values) for values in counts if values]
    if tried:
        terminalreporter.write_line(f"security: {sum(tried)} inputs tried by {len(tried)} fuzz tests")
