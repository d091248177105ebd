"""Reader of GGUF files (versions 2 and 3): metadata, tensor table, raw tensor bytes.

Layout, all little-endian: magic "GGUF", u32 version, u64 tensor count, u64 metadata count, the metadata pairs
(string key, u32 type, value), the tensor table (string name, u32 dims, u64 each dim INNERMOST FIRST, u32 type,
u64 offset), padding to ``general.alignment``, then the tensor data the offsets count from.

Every integer of the file is checked against the file's size before it is used for anything, so that a damaged or
hostile file ends in one ``ModelFileError`` and allocates at most a small multiple of its own size.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from octavo.errors import ModelFileError
from octavo.files.base import TensorInfo
from octavo.files.dtypes import GGUF_TYPES, UNSUPPORTED_GGUF_TYPES, BlockType
from octavo.files.mapped import MappedFile, Source

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
MAX_ARRAY = 1 << 24  # elements; the largest vocabularies have under 2^19
MAX_NESTING = 4
MAX_KEY_BYTES = 65535  # the specification's bound for keys; tensor names are shorter still
LAZY = 4096  # strings of an array that is decoded when it is needed
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
AGAIN = "The file is damaged or incomplete: download it again."

STRING, ARRAY, BOOL = 8, 9, 7
# Metadata value type to numpy's little-endian type.
NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    BOOL: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
SCALARS = {kind: struct.Struct("<" + char) for kind, char in zip(NUMBERS, "BbHhIif?Qqd", strict=True)}
U64 = SCALARS[10]

# Sampling advice in GGUF metadata to the names generation_config.json has for it.
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


class GGUFFile:
    """An opened GGUF file (see ``ModelFiles``); raises ``ModelFileError`` with what is wrong and where."""

    def __init__(self, path: Path, name: str | None = None, source: Source | None = None) -> None:
        self.path = path
        self.name = name or path.stem
        self.format = "gguf"
        self._file = source or MappedFile(path)
        try:
            reader = _Reader(self._file)
            num_tensors, num_pairs = reader.header()
            self.config: Mapping[str, Any] = reader.metadata(num_pairs)
            self._refuse_split()
            self.tensors: Mapping[str, TensorInfo]
            self.tensors, self._offsets = reader.tensor_table(num_tensors, self._alignment())
        except BaseException:
            self._file.close()
            raise
        template = self.config.get("tokenizer.chat_template")
        self.chat_template: str | None = template if isinstance(template, str) else None
        self.generation_config: Mapping[str, Any] = {
            theirs: self.config[f"general.sampling.{ours}"]
            for ours, theirs in SAMPLING.items()
            if f"general.sampling.{ours}" in self.config
        }

    def read(self, name: str) -> NDArray[np.uint8]:
        """The tensor's raw bytes: a flat uint8 view of the mapped file (copies nothing)."""
        return self._file.view(self._offsets[name], self.tensors[name].nbytes)

    def close(self) -> None:
        """Unmap the file."""
        self._file.close()

    def _alignment(self) -> int:
        value = self.config.get("general.alignment", DEFAULT_ALIGNMENT)
        good = isinstance(value, int) and 8 <= value <= MAX_ALIGNMENT and value & (value - 1) == 0
        if not good:
            raise ModelFileError(
                f"{self.path}: general.alignment is {value!r}, not a power of two from 8 on.", AGAIN
            )
        return int(value)

    def _refuse_split(self) -> None:
        parts = self.config.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise ModelFileError(
                f"{self.path} is one of {parts} parts of a split GGUF model, which Octavo does not read.",
                "Join them first: llama-gguf-split --merge FIRST_PART JOINED.gguf",
            )


class Strings(Sequence[str]):
    """An array of strings whose ends are known to be in the file; decoded when somebody first looks at one, which the
    engine, that needs no vocabulary, never does."""

    def __init__(self, data: mmap.mmap | bytes, at: int, count: int, problem: str) -> None:
        self._data, self._at, self._count, self._problem = data, at, count, problem

    @cached_property
    def _values(self) -> list[str]:
        data, at, unpack = self._data, self._at, U64.unpack_from
        values: list[str] = []
        append = values.append
        try:
            for _ in range(self._count):
                stop = at + 8 + unpack(data, at)[0]
                append(data[at + 8 : stop].decode())
                at = stop
        except UnicodeDecodeError:
            raise ModelFileError(self._problem.format(len(values)), AGAIN) from None
        return values

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._values[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)


class _Reader:
    """A cursor over the head of the file; every method moves it on or raises ``ModelFileError``."""

    def __init__(self, file: Source) -> None:
        self.path = file.path
        self.data = file.data
        self.size = file.size
        self.at = 0

    def fail(self, problem: str, cure: str = AGAIN) -> ModelFileError:
        return ModelFileError(f"{self.path}: {problem} (at byte {self.at} of {self.size}).", cure)

    def need(self, nbytes: int, what: str) -> None:
        """The next ``nbytes`` bytes must exist."""
        if nbytes > self.size - self.at:
            raise self.fail(f"{what} takes {nbytes} bytes, beyond the end of the file")

    def number(self, kind: int, what: str) -> Any:
        scalar = SCALARS[kind]
        self.need(scalar.size, what)
        (value,) = scalar.unpack_from(self.data, self.at)
        self.at += scalar.size
        return value

    def text(self, what: str, max_bytes: int | None = None) -> str:
        length = self.number(10, f"the length of {what}")
        if max_bytes is not None and length > max_bytes:
            raise self.fail(f"{what} is {length} bytes long, more than {max_bytes}")
        self.need(length, what)
        raw = self.data[self.at : self.at + length]
        try:
            value = raw.decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8 text") from None
        self.at += length
        return value

    def header(self) -> tuple[int, int]:
        """Number of tensors and of metadata pairs, both possible in a file of this size."""
        if self.data[:4] != MAGIC:
            raise self.fail("this is no GGUF file (wrong magic)", "Give a .gguf file or a model folder.")
        self.at = 4
        version = self.number(4, "the version")
        if version not in VERSIONS:
            big = version & 0xFFFF == 0
            kind = "big-endian" if big else f"version {version}"
            raise self.fail(f"GGUF {kind} is not supported", "Convert it to a little-endian version 3 file.")
        num_tensors = self.number(10, "the tensor count")
        num_pairs = self.number(10, "the metadata count")
        # Smallest entries: a tensor with an empty name and one dimension, a pair with an empty key and one byte.
        for count, smallest, what in (
            (num_tensors, 8 + 4 + 8 + 4 + 8, "tensors"),
            (num_pairs, 8 + 4 + 1, "metadata keys"),
        ):
            if count * smallest > self.size - self.at:
                raise self.fail(f"{count} {what} cannot fit in the file")
        return num_tensors, num_pairs

    def metadata(self, count: int) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        for i in range(count):
            key = self.text(f"metadata key {i}", MAX_KEY_BYTES)
            if key in pairs:
                raise self.fail(f"metadata key {key!r} is there twice")
            kind = self.number(4, f"the type of {key!r}")
            pairs[key] = self.value(kind, key)
        return pairs

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind == STRING:
            return self.text(f"the value of {key!r}")
        if kind in SCALARS:
            return self.number(kind, f"the value of {key!r}")
        if kind != ARRAY:
            raise self.fail(f"{key!r} has the unknown value type {kind}")
        inner = self.number(4, f"the element type of {key!r}")
        count = self.number(10, f"the length of {key!r}")
        if count > MAX_ARRAY:
            raise self.fail(f"{key!r} has {count} elements, more than {MAX_ARRAY}")
        if inner in NUMBERS:
            nbytes = count * NUMBERS[inner].itemsize
            self.need(nbytes, f"array {key!r}")
            raw = np.frombuffer(self.data[self.at : self.at + nbytes], NUMBERS[inner])
            self.at += nbytes
            return raw.tolist()
        if inner == STRING:
            return self.strings(count, key)
        if inner != ARRAY or depth == MAX_NESTING:
            raise self.fail(f"{key!r} is an array of the unknown type {inner} or nested too deep")
        self.need(count * 12, f"array {key!r}")
        return [self.value(ARRAY, key, depth + 1) for _ in range(count)]

    def strings(self, count: int, key: str) -> Sequence[str]:
        """An array of strings, with the loop kept bare: vocabularies have up to 262,144 of them.

        Bounds are still safe: ``at`` only grows, and once it has passed the end the next length (or the check after the
        loop) fails.
        """
        self.need(count * 8, f"array {key!r}")
        data, at, unpack = self.data, self.at, U64.unpack_from
        try:
            for _ in range(count):
                at += 8 + unpack(data, at)[0]
        except (struct.error, OverflowError, IndexError, ValueError):
            at = self.size + 1
        if at > self.size:
            raise self.fail(f"array {key!r} runs beyond the end of the file")
        found = Strings(data, self.at, count, f"{self.path}: element {{}} of {key!r} is not UTF-8 text.")
        self.at = at
        return found if count >= LAZY else list(found)

    def tensor_table(self, count: int, alignment: int) -> tuple[dict[str, TensorInfo], dict[str, int]]:
        """The tensors and their absolute offsets, all inside the file, aligned and without overlap."""
        tensors: dict[str, TensorInfo] = {}
        offsets: dict[str, int] = {}
        for i in range(count):
            info, offset = self.tensor(i)
            if info.name in tensors:
                raise self.fail(f"tensor {info.name!r} is there twice")
            if offset % alignment:
                raise self.fail(f"tensor {info.name!r} has offset {offset}, not a multiple of {alignment}")
            tensors[info.name] = info
            offsets[info.name] = offset
        start = -(-self.at // alignment) * alignment
        room = self.size - start
        end, before = 0, ""
        for name in sorted(offsets, key=offsets.__getitem__):
            offset, nbytes = offsets[name], tensors[name].nbytes
            if offset < end:
                raise self.fail(f"tensors {before!r} and {name!r} overlap")
            end, before = offset + nbytes, name
            if end > room:
                raise self.fail(
                    f"tensor {name!r} needs bytes up to {start + end}, beyond the end of the file"
                )
            offsets[name] = start + offset
        return tensors, offsets

    def tensor(self, i: int) -> tuple[TensorInfo, int]:
        """One row of the table; the offset still counts from the start of the data."""
        name = self.text(f"the name of tensor {i}", MAX_KEY_BYTES)
        num_dims = self.number(4, f"the dimensions of tensor {name!r}")
        if not 1 <= num_dims <= MAX_DIMS:
            raise self.fail(f"tensor {name!r} has {num_dims} dimensions, not 1 to {MAX_DIMS}")
        dims = [self.number(10, f"the shape of tensor {name!r}") for _ in range(num_dims)]
        kind = self.block_type(self.number(4, f"the type of tensor {name!r}"), name)
        offset = self.number(10, f"the offset of tensor {name!r}")
        # Python integers do not overflow, so the product is exact however large the dims claim to be.
        elements = math.prod(dims)
        if elements == 0 or dims[0] % kind.block:
            raise self.fail(
                f"tensor {name!r} has shape {dims}, which {kind.name} blocks of {kind.block} cannot fill"
            )
        nbytes = elements // kind.block * kind.nbytes
        if nbytes > self.size:
            raise self.fail(f"tensor {name!r} of shape {dims} takes {nbytes} bytes, more than the file")
        return TensorInfo(name, kind.name, tuple(reversed(dims)), nbytes), offset

    def block_type(self, number: int, tensor: str) -> BlockType:
        kind = GGUF_TYPES.get(number)
        if kind is None:
            name = UNSUPPORTED_GGUF_TYPES.get(number, f"number {number}")
            readable = " ".join(t.name for t in GGUF_TYPES.values())
            raise self.fail(
                f"tensor {tensor!r} has type {name}, which is not supported",
                f"Take a file with only these types: {readable} (a Q4_K_M, Q5_K_M, Q6_K or Q8_0 file).",
            )
        return kind
