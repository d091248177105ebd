"""A read-only mapping of one regular file; the single place where model files are opened."""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from octavo.errors import ModelFileError


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
            self.data = mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_COPY)
        finally:
            os.close(descriptor)
        self.size = status.st_size

    def view(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Bytes ``[offset, offset + nbytes)`` as a flat uint8 array that shares the mapping; both already checked."""
        return np.frombuffer(self.data, dtype=np.uint8, count=nbytes, offset=offset)

    def close(self) -> None:
        """Unmap now, or with the last array that still looks into the file."""
        try:
            self.data.close()
        except BufferError:
            pass  # a view is alive: unmapping under it would crash, so the last view does it
