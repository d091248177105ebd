"""Ctrl-C that waits for the end of short work."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """A block that Ctrl-C does not cut in two: ``KeyboardInterrupt`` is raised at its end, or by a second Ctrl-C at once.

    For imports, in which the interpreter drops an interrupt that falls into one of its own callbacks, and for the start
    of a child. In another thread than the main one, which hears no signals, and where the shell has us ignore Ctrl-C,
    it is an ordinary block.
    """
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        heard.append(number)
        if len(heard) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        raise KeyboardInterrupt
