"""What the engine's child processes share: dying with the parent, and errors that keep their text on the way home."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading

import msgspec

from octavo import errors
from octavo.errors import OctavoError


class Failed(msgspec.Struct, tag="failed"):
    """An error in another process; ``kind`` is its class name in ``octavo.errors``, or any other."""

    kind: str
    cause: str
    cure: str | None = None

    @classmethod
    def of(cls, error: Exception) -> Failed:
        """From the error that was caught there."""
        if isinstance(error, OctavoError):
            return cls(type(error).__name__, error.cause, error.cure)
        return cls(type(error).__name__, f"{type(error).__name__}: {error}")

    @property
    def deliberate(self) -> bool:
        """Whether it was raised on purpose, with a cause and a cure."""
        return hasattr(errors, self.kind)

    def error(self) -> OctavoError:
        """As an error here: the same class where that takes a cause and a cure, else the base class."""
        kind = getattr(errors, self.kind, OctavoError)
        if not (isinstance(kind, type) and issubclass(kind, OctavoError)):
            kind = OctavoError
        if issubclass(
            kind, errors.RequestError
        ):  # takes other arguments, and is no reason for a process to end
            kind = OctavoError
        return kind(self.cause, self.cure)


def end_child(process: subprocess.Popen[bytes], wait_s: float) -> None:
    """Wait for a child of ``live_with_parent``, kill it where it takes longer, and let go of its standard input."""
    try:
        process.wait(wait_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdin is not None:
        process.stdin.close()


def live_with_parent(folder: str | None = None) -> None:
    """Call first in a child process: ends it when its standard input does, and leaves Ctrl-C to the parent.

    The parent holds the other end and never writes, so the end of input means that the parent is gone, even by
    ``kill -9`` and even while we load or compute. ``folder`` is removed then, since nobody else is left to do it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_watch_parent, args=(folder,), name="octavo-parent", daemon=True).start()


def _watch_parent(folder: str | None) -> None:
    while os.read(0, 1024):
        pass
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
