"""A read-only mapping of one regular file; the single place where model files are opened.

``RemoteHead`` is the same face for a file that lies elsewhere and of which only the beginning is wanted.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from octavo.errors import ModelFileError

MAX_REMOTE_BYTES = 1 << 20  # of one tensor: what describes a model is small, its weights are not wanted


class Source(Protocol):
    """The bytes of a model file; ``size`` is the whole file's."""

    path: Path
    size: int
    data: mmap.mmap | bytes

    def view(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Bytes ``[offset, offset + nbytes)`` as a flat uint8 array; both already checked."""

    def close(self) -> None:
        """Let go of the file."""


class FileMap(mmap.mmap):
    """Memory whose content a file holds too."""


class MappedFile:
    """The bytes of ``path``, mapped. Raises ``ModelFileError`` for what is missing, empty or no regular file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # O_NONBLOCK: opening a pipe must come back, so that it can be refused (CVE-2026-69112).
            descriptor = os.open(
                path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            )
        except OSError as error:
            raise ModelFileError(f"{path}: cannot be opened: {error.strerror}.") from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ModelFileError(f"{path} is not a regular file.")
            if status.st_size == 0:
                raise ModelFileError(f"{path} is empty.", "Download it again.")
            self.data: mmap.mmap | bytes = FileMap(descriptor, status.st_size, access=mmap.ACCESS_COPY)
        finally:
            os.close(descriptor)
        self.size = status.st_size

    def view(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Bytes ``[offset, offset + nbytes)`` as a flat uint8 array that shares the mapping; both already checked."""
        return np.frombuffer(self.data, dtype=np.uint8, count=nbytes, offset=offset)

    def close(self) -> None:
        """Unmap now, or with the last array that still looks into the file."""
        try:
            if isinstance(self.data, mmap.mmap):
                self.data.close()
        except BufferError:
            pass  # a view is alive: unmapping under it would crash, so the last view does it


class RemoteHead:
    """The first bytes of a file elsewhere; ``fetch(start, stop)`` gives any others."""

    def __init__(self, path: Path, size: int, data: bytes, fetch: Callable[[int, int], bytes]) -> None:
        self.path = path
        self.size = size
        self.data: mmap.mmap | bytes = data
        self.fetch = fetch

    def view(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """See ``Source``; only small tensors are fetched."""
        if nbytes > MAX_REMOTE_BYTES:
            raise ModelFileError(f"{self.path}: only headers were fetched, not the weights.")
        return np.frombuffer(self.fetch(offset, offset + nbytes), np.uint8)

    def close(self) -> None:
        """Nothing is open."""


def forget(view: NDArray[np.uint8]) -> None:
    """Let the system take the memory of a part of a mapped file back; reading it again brings it back from the file.

    Nothing happens where ``view`` looks into other memory, or where the system knows no such advice.
    """
    base: object = view
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    if not isinstance(base, FileMap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    offset = view.ctypes.data - np.frombuffer(base, np.uint8, count=1).ctypes.data
    start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (offset + view.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0:
        base.madvise(mmap.MADV_DONTNEED, start, length)
