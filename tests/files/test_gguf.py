"""The GGUF reader: what it reads equals what the reference package writes and reads; what is damaged is refused."""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.errors import ModelFileError, UsageError
from octavo.files.catalogue import SMOLLM2_135M
from octavo.files.dtypes import GGUF_TYPES_BY_NAME
from octavo.files.gguf import GGUFFile
from octavo.files.gguf_write import StoredTensor, write_gguf
from octavo.files.mapped import MappedFile, forget
from octavo.files.resolve import open_model

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.rope.freq_base": 10000.5,
    "a.true": True,
    "a.negative": -5,
    "a.big": 2**40,
    "a.text": "héllo \n",
    "a.strings": ["a", "", "ein Wört", "\0"],
    "a.ints": [1, -2, 3],
    "a.floats": [0.5, -1.25],
    "a.bools": [True, False],
    "a.bytes": np.array([1, 255], np.uint8),
    "tokenizer.chat_template": "{{ messages }}",
}


def small_file(path: Path) -> Path:
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {
        "token_embd.weight": rng.standard_normal((5, 32)).astype(np.float32),
        "output_norm.weight": rng.standard_normal(32).astype(np.float16),
        "blk.0.attn_q.weight": StoredTensor(
            "Q4_1", (3, 64), rng.integers(0, 256, 3 * 2 * 20, dtype=np.uint8)
        ),
    }
    write_gguf(path, METADATA, tensors)
    return path


def raw_file(
    path: Path,
    *,
    version: int = 3,
    num_tensors: int = 1,
    num_pairs: int = 0,
    pairs: bytes = b"",
    name: bytes = b"t",
    dims: tuple[int, ...] = (32,),
    kind: int = 0,
    offset: int = 0,
    data: int = 128,
    more: bytes = b"",
) -> Path:
    """A file with one tensor, any field of which can lie."""
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_pairs) + pairs
    head += struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    head += struct.pack("<IQ", kind, offset) + more
    path.write_bytes(head + b"\0" * (-len(head) % 32) + b"\1" * data)
    return path


def pair(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def test_reads_what_the_writer_wrote(tmp_path: Path) -> None:
    file = GGUFFile(small_file(tmp_path / "m.gguf"))
    assert file.name == "m" and file.format == "gguf"
    assert file.config == {**METADATA, "a.bytes": [1, 255]}
    assert type(file.config["a.ints"]) is list and file.config["a.bools"][0] is True
    assert file.chat_template == "{{ messages }}" and file.generation_config == {}
    info = file.tensors["blk.0.attn_q.weight"]
    assert (info.dtype, info.shape, info.nbytes) == ("Q4_1", (3, 64), 120)
    embedding = file.read("token_embd.weight")
    assert embedding.dtype == np.uint8 and embedding.ndim == 1 and not embedding.flags.owndata
    expected = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    assert np.array_equal(embedding.view(np.float32).reshape(5, 32), expected)
    file.close()
    assert embedding.view(np.float32)[0] == expected[0, 0]  # a view outlives close()


def test_reads_what_the_reference_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -3)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -30000)
    writer.add_uint32("u32", 2**31)
    writer.add_int32("i32", -1)
    writer.add_float32("f32", 0.1)
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**62))
    writer.add_float64("f64", 0.1)
    writer.add_bool("no", False)
    writer.add_array("words", ["ab", "ü"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_float32("general.sampling.temp", 0.25)
    values = np.arange(96, dtype=np.float32).reshape(3, 32)
    writer.add_tensor("w", values)
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"):
        kind = gguf.GGMLQuantizationType[name]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = GGUFFile(path)
    wanted = {
        "u8": 200, "i8": -3, "u16": 60000, "i16": -30000, "u32": 2**31, "i32": -1, "f32": float(np.float32(0.1)),
        "u64": 2**63, "i64": -(2**62), "f64": 0.1, "no": False, "words": ["ab", "ü"], "numbers": [1, 2, 3],
    }  # fmt: skip
    assert {key: file.config[key] for key in wanted} == wanted
    assert file.generation_config == {"temperature": 0.25}
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"):
        expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name]).view(np.uint8).reshape(-1)
        assert file.tensors[name].dtype == name and file.tensors[name].shape == (3, 32)
        assert np.array_equal(file.read(name), expected)


def test_the_reference_package_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tensors: dict[str, Any] = {
        name: StoredTensor(name, (2, 256), np.full(512 // kind.block * kind.nbytes, 3, np.uint8))
        for name, (_, kind) in GGUF_TYPES_BY_NAME.items()
    }
    write_gguf(path, METADATA, tensors)
    reader = gguf.GGUFReader(path)
    assert {field.name: field.contents() for field in reader.fields.values() if field.name in METADATA} == {
        **METADATA, "a.bytes": [1, 255]
    }  # fmt: skip
    assert {t.name: (t.tensor_type.name, int(t.n_bytes)) for t in reader.tensors} == {
        name: (name, tensor.data.size) for name, tensor in tensors.items()
    }
    ours = GGUFFile(path)
    for theirs in reader.tensors:
        assert ours._offsets[theirs.name] == theirs.data_offset


def test_the_writer_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    for metadata in ({"k": None}, {"k": [1, "a"]}, {"k": 2**64}, {"k": np.zeros((1, 1), np.float32)}):
        with pytest.raises(UsageError, match="'k'"):
            write_gguf(tmp_path / "m.gguf", metadata)
    for tensor in (
        np.zeros(3),
        StoredTensor("Q4_0", (33,), np.zeros(18, np.uint8)),
        StoredTensor("Q9", (1,), b""),
    ):  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="'t'"):
            write_gguf(tmp_path / "m.gguf", {}, {"t": tensor})


def test_version_2_nested_arrays_and_other_alignments(tmp_path: Path) -> None:
    inner = struct.pack("<IQ", 4, 2) + struct.pack("<2I", 5, 6)
    pairs = pair("nested", 9, struct.pack("<IQ", 9, 2) + inner + inner)
    pairs += pair("general.alignment", 4, struct.pack("<I", 64))
    path = raw_file(tmp_path / "m.gguf", version=2, num_pairs=2, pairs=pairs, data=192)
    assert GGUFFile(path).config["nested"] == [[5, 6], [5, 6]]


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"version": 4}, "version 4 is not supported"),
    "version one": ({"version": 1}, "version 1 is not supported"),
    "big-endian": ({"version": 3 << 24}, "big-endian"),
    "many tensors": ({"num_tensors": 2**63}, "tensors cannot fit"),
    "more tensors than there are": ({"num_tensors": 3}, "more than 65535"),
    "many pairs": ({"num_pairs": 2**64 - 1}, "metadata keys cannot fit"),
    "name not UTF-8": ({"name": b"\xff"}, "not UTF-8"),
    "no dimensions": ({"dims": ()}, "has 0 dimensions"),
    "five dimensions": ({"dims": (32, 1, 1, 1, 1)}, "has 5 dimensions"),
    "zero dimension": ({"dims": (32, 0)}, "cannot fill"),
    "product overflows 64 bits": ({"dims": (2**62, 8)}, "more than the file"),
    "product overflows to a fit": ({"dims": (2**32, 2**32)}, "more than the file"),
    "huge dimension": ({"dims": (2**64 - 32,)}, "more than the file"),
    "block size": ({"dims": (33,), "kind": 2}, "Q4_0 blocks of 32 cannot fill"),
    "256-blocks": ({"dims": (128,), "kind": 12}, "Q4_K blocks of 256 cannot fill"),
    "unsupported type": ({"kind": 17}, "type IQ2_XS, which is not supported"),
    "unknown type": ({"kind": 77}, "type number 77, which is not supported"),
    "offset beyond the file": ({"offset": 4096}, "beyond the end of the file"),
    "offset overflows": ({"offset": 2**64 - 32}, "beyond the end of the file"),
    "offset not aligned": ({"offset": 4}, "not a multiple of 32"),
    "size beyond the file": ({"dims": (64,)}, "more than the file|beyond the end of the file"),
    "end beyond the file": ({"data": 127}, "beyond the end of the file"),
    "unknown value type": ({"num_pairs": 1, "pairs": pair("k", 13, b"")}, "unknown value type 13"),
    "duplicate key": ({"num_pairs": 2, "pairs": pair("k", 7, b"\1") * 2}, "'k' is there twice"),
    "long key": ({"num_pairs": 1, "pairs": struct.pack("<Q", 2**40)}, "more than 65535"),
    "long string": ({"num_pairs": 1, "pairs": pair("k", 8, struct.pack("<Q", 2**62))}, "beyond the end"),
    "string not UTF-8": ({"num_pairs": 1, "pairs": pair("k", 8, text(b"\xc3"))}, "not UTF-8"),
    "long array": (
        {"num_pairs": 1, "pairs": pair("k", 9, struct.pack("<IQ", 0, 2**63))},
        "more than 16777216",
    ),
    "array beyond the end": (
        {"num_pairs": 1, "pairs": pair("k", 9, struct.pack("<IQ", 10, 999))},
        "beyond the end",
    ),
    "strings beyond the end": (
        {"num_pairs": 1, "pairs": pair("k", 9, struct.pack("<IQ", 8, 999))},
        "beyond the end",
    ),
    "one string too long": (
        {"num_pairs": 1, "pairs": pair("k", 9, struct.pack("<IQQ", 8, 1, 2**63 - 8))},
        "runs beyond the end",
    ),
    "the first string too long": (
        {"num_pairs": 1, "pairs": pair("k", 9, struct.pack("<IQQ", 8, 2, 2**64 - 1))},
        "runs beyond the end",
    ),
    "strings not UTF-8": (
        {"num_pairs": 1, "pairs": pair("k", 9, struct.pack("<IQ", 8, 2) + text(b"ok") + text(b"\xff"))},
        "element 1 of 'k' is not UTF-8",
    ),
    "array of nothing": (
        {"num_pairs": 1, "pairs": pair("k", 9, struct.pack("<IQ", 99, 1))},
        "unknown type 99",
    ),
    "nested too deep": (
        {"num_pairs": 1, "pairs": pair("k", 9, struct.pack("<IQ", 9, 1) * 9)},
        "nested too deep",
    ),
    "nested beyond the end": (
        {"num_pairs": 1, "pairs": pair("k", 9, struct.pack("<IQ", 9, 999))},
        "array 'k' takes 11988 bytes",
    ),
    "alignment zero": (
        {"num_pairs": 1, "pairs": pair("general.alignment", 4, b"\0\0\0\0")},
        "general.alignment is 0",
    ),
    "alignment huge": (
        {"num_pairs": 1, "pairs": pair("general.alignment", 10, struct.pack("<Q", 2**63))},
        "general.alignment is",
    ),
    "alignment a text": (
        {"num_pairs": 1, "pairs": pair("general.alignment", 8, text(b"32"))},
        "general.alignment is",
    ),
    "split": ({"num_pairs": 1, "pairs": pair("split.count", 2, b"\3\0")}, "one of 3 parts"),
}


@pytest.mark.parametrize("lie", list(LIES))
def test_cve_2026_7482_and_kin_lying_integers_are_refused(tmp_path: Path, lie: str) -> None:
    """Also CVE-2024-39720, -12055, CVE-2025-0312/0315/0317, CVE-2025-53630, CVE-2026-27940, CVE-2024-21802."""
    fields, message = LIES[lie]
    path = raw_file(tmp_path / "m.gguf", **fields)
    with pytest.raises(ModelFileError, match=message) as caught:
        GGUFFile(path)
    assert str(path) in str(caught.value) and caught.value.cure


def test_two_tensors_must_not_overlap_or_share_a_name(tmp_path: Path) -> None:
    def second(name: bytes, offset: int) -> bytes:
        return text(name) + struct.pack("<IQIQ", 1, 32, 0, offset)

    path = tmp_path / "m.gguf"
    with pytest.raises(ModelFileError, match="'t' and 'u' overlap"):
        GGUFFile(raw_file(path, num_tensors=2, more=second(b"u", 96), data=256))
    with pytest.raises(ModelFileError, match="'t' is there twice"):
        GGUFFile(raw_file(path, num_tensors=2, more=second(b"t", 128), data=256))
    assert list(GGUFFile(raw_file(path, num_tensors=2, more=second(b"u", 128), data=256)).tensors) == [
        "t",
        "u",
    ]


def test_files_that_are_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(ModelFileError, match="cannot be opened"):
        GGUFFile(path)
    path.write_bytes(b"")
    with pytest.raises(ModelFileError, match="is empty"):
        GGUFFile(path)
    for content in (b"GG", b"<!doctype html><html>not found</html>"):
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match="no GGUF file"):
            GGUFFile(path)
    with pytest.raises(ModelFileError, match=r"cannot be opened|not a regular file"):
        GGUFFile(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_cve_2026_69112_a_pipe_is_refused_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(ModelFileError, match="not a regular file"):
        GGUFFile(tmp_path / "m.gguf")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = small_file(tmp_path / "m.gguf").read_bytes()
    data_end = len(whole) - (-120 % 32)  # the padding behind the last tensor may be missing
    for size in range(1, data_end):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ModelFileError):
            GGUFFile(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(whole[:data_end])
    assert len(GGUFFile(tmp_path / "cut.gguf").tensors) == 3


def mutate(whole: bytes, changes: list[tuple[int, int]], numbers: list[tuple[int, int]]) -> bytes:
    raw = bytearray(whole)
    for at, value in changes:
        raw[at % len(raw)] ^= value
    for at, value in numbers:
        at %= len(raw) - 8
        raw[at : at + 8] = struct.pack("<Q", value)
    return bytes(raw)


EDGES = st.sampled_from([0, 1, 31, 2**16, 2**31 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 255)), max_size=6),
    numbers=st.lists(st.tuples(st.integers(0, 700), EDGES), max_size=2),
)
def test_fuzz_damage_never_does_more_than_model_file_error(
    tmp_path: Path, changes: list[tuple[int, int]], numbers: list[tuple[int, int]]
) -> None:
    source = tmp_path / "m.gguf"
    if not source.exists():
        small_file(source)
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(mutate(source.read_bytes(), changes, numbers))
    try:
        file = GGUFFile(path)
    except ModelFileError as error:
        assert str(path) in str(error)
        return
    size = path.stat().st_size
    for name, info in file.tensors.items():  # what was accepted can be read in full, inside the file
        assert file.read(name).nbytes == info.nbytes <= size
        kind = GGUF_TYPES_BY_NAME[info.dtype][1]
        assert math.prod(info.shape) // kind.block * kind.nbytes == info.nbytes


def peak_allocation(action: Callable[[], object]) -> int:
    import tracemalloc

    tracemalloc.start()
    try:
        action()
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return peak


@pytest.mark.parametrize(
    "lie", ["many tensors", "many pairs", "long string", "long array", "one string too long"]
)
def test_cve_2025_0315_lies_allocate_nothing(tmp_path: Path, lie: str) -> None:
    path = raw_file(tmp_path / "m.gguf", **LIES[lie][0])

    def attempt() -> None:
        with pytest.raises(ModelFileError):
            GGUFFile(path)

    assert peak_allocation(attempt) < 1 << 20


def test_a_vocabulary_opens_with_little_work_and_memory(tmp_path: Path) -> None:
    """Counted, not timed: bytecode lines executed per string stay constant."""
    counts = []
    for size in (1000, 3000):
        path = tmp_path / f"{size}.gguf"
        write_gguf(path, {"tokens": [f"token{i}" for i in range(size)]})
        lines = 0

        def count(frame: Any, event: str, _: Any) -> Any:
            nonlocal lines
            lines += event == "line" and frame.f_code.co_name == "strings"
            return count

        before = sys.gettrace()
        sys.settrace(count)
        try:
            GGUFFile(path)
        finally:
            sys.settrace(before)
        counts.append(lines)
    assert (counts[1] - counts[0]) / 2000 <= 6


@pytest.mark.model
def test_the_demo_model_opens_whole() -> None:
    files = open_model("smollm2:135m")
    assert len(files.tensors) == 272 and len(files.config["tokenizer.ggml.tokens"]) == 49152
    assert files.path.stat().st_size == SMOLLM2_135M.nbytes
    assert files.generation_config["temperature"] == 0.2 and files.chat_template
    dtypes = [info.dtype for info in files.tensors.values()]
    assert (dtypes.count("Q4_1"), dtypes.count("Q8_0"), dtypes.count("F32")) == (210, 1, 61)


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident pages")
def test_forgotten_parts_leave_memory_and_come_back(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, 4 << 20, dtype=np.uint8)
    (tmp_path / "file").write_bytes(content.tobytes())
    file = MappedFile(tmp_path / "file")

    def resident() -> int:
        text = Path("/proc/self/smaps").read_text()
        entry = text[text.index(str(tmp_path / "file")) :]
        return int(re.search(r"Rss:\s+(\d+) kB", entry).group(1))  # type: ignore[union-attr]

    view = file.view(100, (4 << 20) - 100)
    assert view.sum(dtype=np.int64) == content[100:].sum(dtype=np.int64)
    before = resident()
    forget(view[:-5].reshape(-1, 1))
    assert before >= 4000 and resident() < 100
    assert np.array_equal(view, content[100:])
    other = mmap.mmap(-1, 1 << 16)
    for array in (content, np.frombuffer(other, np.uint8)):  # other memory: nothing happens
        array[:] = 7
        forget(array)
        assert (array == 7).all()
    file.close()


def test_large_arrays_of_strings_are_decoded_when_they_are_needed(tmp_path: Path) -> None:
    words = [f"wört {i}" for i in range(5000)]
    write_gguf(tmp_path / "a.gguf", {**METADATA, "a.words": words}, {})
    found = GGUFFile(tmp_path / "a.gguf").config["a.words"]
    assert len(found) == 5000
    assert found[7] == "wört 7" and found[-2:] == words[-2:] and list(found) == words
    damaged = (tmp_path / "a.gguf").read_bytes().replace("wört 4321".encode(), b"w\xc3\xc3rt 4321")
    (tmp_path / "a.gguf").write_bytes(damaged)
    found = GGUFFile(tmp_path / "a.gguf").config["a.words"]
    assert len(found) == 5000
    with pytest.raises(ModelFileError, match=r"a\.gguf: element 4321 of 'a\.words' is not UTF-8"):
        list(found)
