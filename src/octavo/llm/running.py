"""Around a run in the caller's thread: Ctrl-C between steps, and a progress bar."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Count = Callable[[], tuple[int, int]]  # prompts that are done, tokens so far


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back: yields a function that says whether it was pressed. A second one interrupts at once.

    An interrupt in the middle of a step would leave pages half booked; between steps it is harmless.
    """
    pressed = False

    def handle(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def progress(total: int, wanted: bool) -> Iterator[Callable[[Count], None]]:
    """A progress bar on a terminal, which asks now and then how far it is; otherwise a function that does nothing."""
    if not wanted or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=False) as bar:
        task = bar.add_task("Processed prompts", total=total)
        shown = time.monotonic()
        last: Count | None = None

        def show() -> None:
            if last is None:
                return
            completed, tokens = last()
            bar.update(task, completed=completed, description=f"{tokens} tokens")

        def tick(count: Count) -> None:
            nonlocal shown, last
            last = count
            if time.monotonic() - shown >= 0.1:
                shown = time.monotonic()
                show()

        yield tick
        show()
