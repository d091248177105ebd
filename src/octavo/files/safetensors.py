"""Reader of safetensors files: header checked, tensor bytes mapped.

Layout: u64 little-endian header size, that many bytes of JSON ({name: {dtype, shape, data_offsets: [begin, end]}},
and "__metadata__"), then the data the offsets count from, without holes or overlaps.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from octavo.errors import ModelFileError
from octavo.files.base import TensorInfo
from octavo.files.dtypes import SAFETENSORS_BITS
from octavo.files.jsonfile import parse_json
from octavo.files.mapped import MappedFile, Source

MAX_HEADER_BYTES = 100_000_000  # the format's own bound
MAX_DIMS = 8
AGAIN = "The file is damaged or incomplete: download it again."


class SafetensorsFile:
    """One opened safetensors file (or the ``source`` of one); raises ``ModelFileError`` with what is wrong and where."""

    def __init__(self, path: Path, source: Source | None = None) -> None:
        self.path = path
        self._file = source or MappedFile(path)
        try:
            self.tensors: Mapping[str, TensorInfo]
            self.tensors, self._offsets = self._parse()
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str) -> NDArray[np.uint8]:
        """The tensor's raw bytes: a flat uint8 view of the mapped file (copies nothing)."""
        nbytes = self.tensors[name].nbytes
        if nbytes == 0:  # an empty tensor may lie exactly at the end, where there is nothing to view
            return np.empty(0, np.uint8)
        return self._file.view(self._offsets[name], nbytes)

    def close(self) -> None:
        """Unmap the file."""
        self._file.close()

    def _fail(self, problem: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {problem}.", AGAIN)

    def _parse(self) -> tuple[dict[str, TensorInfo], dict[str, int]]:
        size = self._file.size
        if size < 8:
            raise self._fail(f"{size} bytes are too few for a safetensors file")
        (header_bytes,) = struct.unpack_from("<Q", self._file.data, 0)
        if header_bytes > min(size - 8, MAX_HEADER_BYTES):
            raise self._fail(f"a header of {header_bytes} bytes cannot fit in this file of {size}")
        header = parse_json(self._file.data[8 : 8 + header_bytes], f"{self.path}: header", AGAIN)
        start, room = 8 + header_bytes, size - 8 - header_bytes
        header.pop("__metadata__", None)
        tensors: dict[str, TensorInfo] = {}
        ranges: list[tuple[int, int, str]] = []
        for name, entry in header.items():
            tensors[name], begin, end = self._entry(name, entry, room)
            ranges.append((begin, end, name))
        at = 0
        for begin, end, name in sorted(ranges):
            if begin != at:
                problem = "overlaps the one before it" if begin < at else "leaves a hole before it"
                raise self._fail(f"tensor {name!r} at bytes {begin} to {end} {problem}")
            at = end
        if at != room:
            raise self._fail(f"the tensors take {at} bytes, but the file has {room}")
        return tensors, {name: start + begin for begin, _, name in ranges}

    def _entry(self, name: str, entry: Any, room: int) -> tuple[TensorInfo, int, int]:
        """One checked header entry with its byte range in the data."""
        if not isinstance(entry, dict):
            raise self._fail(f"the entry of tensor {name!r} is no object")
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in SAFETENSORS_BITS:
            raise self._fail(f"tensor {name!r} has the unknown dtype {_short(dtype)}")
        if not _is_counts(shape) or len(shape) > MAX_DIMS:
            raise self._fail(f"tensor {name!r} has the impossible shape {_short(shape)}")
        if not _is_counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= room:
            raise self._fail(
                f"tensor {name!r} has data_offsets {_short(offsets)}, outside the {room} bytes of data"
            )
        begin, end = offsets
        if math.prod(shape) * SAFETENSORS_BITS[dtype] != (end - begin) * 8:
            raise self._fail(
                f"tensor {name!r}: {dtype} of shape {_short(shape)} does not take {end - begin} bytes"
            )
        return TensorInfo(name, dtype, tuple(shape), end - begin), begin, end


def _is_counts(value: Any) -> TypeGuard[list[int]]:
    """A list of integers >= 0 (JSON's true is no 1)."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
