"""Writer of GGUF version 3 files, for requantization and for tests.

Values take the types that model files use: bool, u32 (i32, u64, i64 where it does not fit), f32, string; lists are
arrays of bool, i32, f32 or string. A numpy array keeps its own element type.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from octavo.errors import UsageError
from octavo.files.dtypes import GGUF_TYPES_BY_NAME
from octavo.files.gguf import ARRAY, DEFAULT_ALIGNMENT, MAGIC, NUMBERS, SCALARS, STRING

U32, I32, F32, BOOL, U64, I64 = 4, 5, 6, 7, 10, 11


@dataclass(frozen=True)
class StoredTensor:
    """A tensor ready to be written: type name, row-major shape, raw bytes (flat uint8)."""

    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


def write_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor | NDArray[Any]] | None = None
) -> None:
    """Write a model file; float32 and float16 arrays are stored as F32 and F16. Raises ``UsageError``."""
    stored = {name: _stored(name, tensor) for name, tensor in (tensors or {}).items()}
    alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    with path.open("wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", 3, len(stored), len(metadata)))
        for key, value in metadata.items():
            file.write(_string(key) + _value(key, value))
        offset = 0
        for name, tensor in stored.items():
            number, _ = GGUF_TYPES_BY_NAME[tensor.dtype]
            dims = tuple(reversed(tensor.shape))
            file.write(_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, number, offset))
            offset += -(-tensor.data.size // alignment) * alignment
        _pad(file, alignment)
        for tensor in stored.values():
            file.write(tensor.data.tobytes())
            _pad(file, alignment)


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(b"\0" * (-file.tell() % alignment))


def _stored(name: str, tensor: StoredTensor | NDArray[Any]) -> StoredTensor:
    if not isinstance(tensor, StoredTensor):
        names = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}
        if tensor.dtype not in names:
            raise UsageError(
                f"Tensor {name!r} is {tensor.dtype}.", "Give float32, float16 or a StoredTensor."
            )
        raw = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        tensor = StoredTensor(names[tensor.dtype], tensor.shape, raw)
    found = GGUF_TYPES_BY_NAME.get(tensor.dtype)
    if found is None:
        raise UsageError(f"Tensor {name!r} has type {tensor.dtype}, which cannot be written.")
    kind = found[1]
    fits = 1 <= len(tensor.shape) <= 4 and tensor.shape[-1] % kind.block == 0
    if not fits or math.prod(tensor.shape) // kind.block * kind.nbytes != tensor.data.size:
        raise UsageError(
            f"Tensor {name!r}: {tensor.data.size} bytes of {tensor.dtype} do not fill {tensor.shape}."
        )
    return tensor


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Any) -> bytes:
    """Type number and value of one metadata entry."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, list | tuple | np.ndarray):
        return struct.pack("<I", ARRAY) + _array(key, value)
    kind = _scalar_type(key, value)
    return struct.pack("<I", kind) + SCALARS[kind].pack(value)


def _array(key: str, values: list[Any] | tuple[Any, ...] | NDArray[Any]) -> bytes:
    if isinstance(values, np.ndarray):
        kind = next((k for k, dtype in NUMBERS.items() if dtype == values.dtype), None)
        if kind is None or values.ndim != 1:
            raise UsageError(
                f"{key!r}: an array of {values.dtype} with {values.ndim} dimensions cannot be written."
            )
        return struct.pack("<IQ", kind, values.size) + values.astype(NUMBERS[kind]).tobytes()
    if values and all(isinstance(value, str) for value in values):
        return struct.pack("<IQ", STRING, len(values)) + b"".join(map(_string, values))
    kinds = {_scalar_type(key, value) for value in values}
    if kinds <= {U32, I32}:
        kind = I32 if all(value < 2**31 for value in values) else U32
    elif len(kinds) == 1:
        kind = kinds.pop()
    else:
        raise UsageError(f"{key!r} is a list of mixed types.", "Give a numpy array.")
    return struct.pack("<IQ", kind, len(values)) + np.array(values, NUMBERS[kind]).tobytes()


def _scalar_type(key: str, value: Any) -> int:
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, float):
        return F32
    if isinstance(value, int):
        for kind, low, high in ((U32, 0, 2**32), (I32, -(2**31), 0), (U64, 0, 2**64), (I64, -(2**63), 0)):
            if low <= value < high:
                return kind
    raise UsageError(f"{key!r}: {value!r} cannot be written to GGUF metadata.")
