"""Progress of loading and downloading, on standard error: a bar on a terminal, a line a phase elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

BAR_WIDTH = 24
INTERVAL_S = 0.1


class Reporter:
    """Called with (phase, done, all); ``all`` 0 means unknown. ``close`` ends the line that is being drawn."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self.terminal = self.stream.isatty()
        self.phase = ""
        self.drawn = 0.0
        self.open = False

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that ``phase`` has come to ``done`` of ``total``."""
        if self.quiet:
            return
        is_new = phase != self.phase
        if is_new:
            self.close()
            self.phase = phase
            if not self.terminal:
                print(f"{phase} ...", file=self.stream, flush=True)
        if not self.terminal:
            return
        now = time.monotonic()
        finished = total > 0 and done >= total
        if not (is_new or finished) and now - self.drawn < INTERVAL_S:
            return
        self.drawn = now
        self._draw(phase, done, total)

    def close(self) -> None:
        """Leave the drawn line as it is and begin a new one."""
        if self.open:
            print(file=self.stream, flush=True)
            self.open = False

    def _draw(self, phase: str, done: int, total: int) -> None:
        text = phase
        if total > 0:
            share = min(1.0, done / total)
            filled = round(share * BAR_WIDTH)
            text = f"{phase:<18} [{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {share:4.0%}  {amount(done, total)}"
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]:<{width}}", end="", file=self.stream, flush=True)
        self.open = True


def amount(done: int, total: int) -> str:
    """``12.3 / 98.4 MB``, or plain counts where they are too small to be bytes of a model."""
    if total < 100_000:
        return f"{done} / {total}"
    return f"{done / 1e6:.1f} / {total / 1e6:.1f} MB"
