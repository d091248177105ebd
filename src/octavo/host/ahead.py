"""Work of a start that needs no decision and no interpreter, done beside the imports: weights on their way from the disk into
the system's memory, and the GPU's context."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path

from octavo.device.platform.machine import available_bytes
from octavo.files.base import ModelFiles

WINDOW_BYTES = 64 << 20
DRIVER = "libcuda.so.1"


def read_weights_ahead(files: ModelFiles) -> threading.Thread | None:
    """Ask the system, in a thread, to read the weights that another process will load; costs next to nothing where they
    are in its memory already. None where they would fill more than half of what is free, or the system cannot do it."""
    if files.format == "dummy" or not hasattr(os, "posix_fadvise"):
        return None
    paths = [files.path] if files.path.is_file() else sorted(files.path.glob("*.safetensors"))
    if sum(path.stat().st_size for path in paths) > available_bytes()[0] // 2:
        return None
    return beside(lambda: _advise(paths))


def _advise(paths: list[Path]) -> None:
    for path in paths:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            continue  # the loading will say so
        try:
            for start in range(0, os.fstat(descriptor).st_size, WINDOW_BYTES):
                os.posix_fadvise(descriptor, start, WINDOW_BYTES, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


def open_gpu_ahead(load: Callable[[str], ctypes.CDLL] = ctypes.CDLL) -> threading.Thread:
    """Create the first GPU's primary context in a thread, while torch is imported: torch finds it there and uses it.

    The driver's calls release the interpreter. Whatever fails is left for torch to say.
    """

    def work() -> None:
        try:
            driver = load(DRIVER)
        except OSError:
            return
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)

    return beside(work)


def beside(work: Callable[[], None]) -> threading.Thread:
    """``work`` in a thread that no exit waits for."""
    thread = threading.Thread(target=work, name="octavo-ahead", daemon=True)
    thread.start()
    return thread
