"""Hugging Face folders: what is read equals what was saved; damaged files and names that escape are refused."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.errors import ModelFileError
from octavo.files.dummy import PRESETS, open_dummy
from octavo.files.folder import FolderFiles
from octavo.files.resolve import open_model
from octavo.files.safetensors import SafetensorsFile

INDEX = "model.safetensors.index.json"


def save(path: Path, tensors: dict[str, Any]) -> None:
    safetensors.numpy.save_file(tensors, str(path), metadata={"format": "pt"})


def make_folder(path: Path, *, shards: bool = False, **config: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8, **config}))
    first = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    second = {"b": np.arange(4, dtype=np.float16), "empty": np.zeros((0, 4), np.int8)}
    if not shards:
        save(path / "model.safetensors", {**first, **second})
        return path
    save(path / "model-00001-of-00002.safetensors", first)
    save(path / "model-00002-of-00002.safetensors", second)
    names = {"a": "model-00001-of-00002.safetensors"}
    names |= dict.fromkeys(second, "model-00002-of-00002.safetensors")
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return path


def edit_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [False, True])
def test_reads_what_was_saved(tmp_path: Path, shards: bool) -> None:
    folder = make_folder(tmp_path / "tiny", shards=shards, unknown_key={"x": [1]})
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "eos_token_id": [1, 2]}')
    files = open_model(str(folder))
    assert files.format == "safetensors" and files.path == folder
    assert files.config["unknown_key"] == {"x": [1]} and files.generation_config["eos_token_id"] == [1, 2]
    assert {n: (t.dtype, t.shape) for n, t in files.tensors.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("F16", (4,)),
        "empty": ("I8", (0, 4)),
    }
    values = files.read("a")
    assert not values.flags.owndata and np.array_equal(values.view(np.float32), np.arange(6))
    assert np.array_equal(files.read("b").view(np.float16), np.arange(4)) and files.read("empty").size == 0
    files.close()


def test_folder_without_an_index_takes_all_but_the_second_copy(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, shards=True)
    (folder / INDEX).unlink()
    save(folder / "consolidated.safetensors", {"a": np.zeros(1, np.float32)})
    assert set(FolderFiles(folder).tensors) == {"a", "b", "empty"}
    save(folder / "extra.safetensors", {"a": np.zeros(1, np.float32)})
    with pytest.raises(ModelFileError, match=r"'a' is in .* and in"):
        FolderFiles(folder)


def test_the_index_decides_which_copy_counts(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, shards=True)
    save(folder / "model-00002-of-00002.safetensors", {
        "a": np.zeros(1, np.float32), "b": np.zeros(1, np.float16), "empty": np.zeros(0, np.int8),
    })  # fmt: skip
    assert FolderFiles(folder).tensors["a"].shape == (2, 3)
    edit_index(folder, c="model-00001-of-00002.safetensors")
    with pytest.raises(ModelFileError, match="expects tensor 'c'"):
        FolderFiles(folder)


def test_cve_2026_75104_shard_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    """Also CVE-2024-45436, CVE-2025-44779, CVE-2026-7020: parent, absolute and device names."""
    outside = tmp_path / "secret.safetensors"
    save(outside, {"a": np.zeros(1, np.float32)})
    folder = make_folder(tmp_path / "model", shards=True)
    names = ["../secret.safetensors", str(outside), "x/../../secret.safetensors", "C:\\secret.safetensors"]
    names += ["..\\secret.safetensors", "a\0.safetensors", "/dev/zero.safetensors"]
    for name in names:
        edit_index(folder, a=name)
        with pytest.raises(ModelFileError, match="outside the model folder"):
            FolderFiles(folder)
    for name in ("missing.safetensors", "missing/x.safetensors"):
        edit_index(folder, a=name)
        with pytest.raises(ModelFileError, match="is missing"):
            FolderFiles(folder)
    for name in (1, None, "weights.bin", "model.safetensors/"):
        edit_index(folder, a=name)
        with pytest.raises(ModelFileError, match="no safetensors file"):
            FolderFiles(folder)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "chat_template.jinja", "generation_config.json"]
)
def test_cve_2026_75104_links_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "model")
    (tmp_path / "secret").write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ModelFileError, match="link that leaves the model folder"):
        FolderFiles(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(name)  # a loop
    if name in ("config.json", "model.safetensors"):
        with pytest.raises(ModelFileError):
            FolderFiles(folder)


def test_links_inside_the_folder_and_of_the_hub_cache_are_fine(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "inside")
    (folder / "model.safetensors").rename(folder / "real")
    (folder / "model.safetensors").symlink_to("real")
    assert len(FolderFiles(folder).tensors) == 3

    cache = tmp_path / "models--org--name"
    snapshot = make_folder(cache / "snapshots" / "abc")
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(cache / "blobs" / str(number))
        file.symlink_to(Path("../../blobs") / str(number))
    assert len(FolderFiles(snapshot).tensors) == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json"])
def test_cve_2026_69112_pipes_are_refused(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ModelFileError, match="not a regular file"):
        FolderFiles(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_cve_2025_24357_pickles_are_refused_with_the_cure(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    with pytest.raises(ModelFileError, match="a pickle, which can run any code") as caught:
        FolderFiles(folder)
    assert "save_pretrained" in str(caught.value) and not (folder / "canary").exists()


def test_cve_2025_66448_auto_map_is_data_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also CVE-2026-22807, CVE-2026-4372, CVE-2026-5241: config keys that name code are only data."""
    folder = make_folder(
        tmp_path / "m", auto_map={"AutoConfig": "evil.Config", "AutoModel": "org/repo--evil.Model"}
    )
    canary = f"open({str(tmp_path / 'canary')!r}, 'w')"
    for name in ("evil.py", "__init__.py", "configuration_llama.py"):
        (folder / name).write_text(canary)
    monkeypatch.chdir(folder)
    files = open_model(str(folder))
    dummy = open_model(str(folder), load_format="dummy")
    assert files.config["auto_map"] == dummy.config["auto_map"]
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xff{}", "not UTF-8"),
        (b"[1]", "no JSON object"),
        (b"{", "not valid JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_damaged_json_is_one_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    folder = make_folder(tmp_path)
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ModelFileError, match=message) as caught:
        FolderFiles(folder)
    assert "config.json" in str(caught.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"no config\.json"):
        FolderFiles(tmp_path)
    folder = make_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match="no weights"):
        FolderFiles(folder)
    (folder / INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(ModelFileError, match="has no weight_map"):
        FolderFiles(folder)


def test_chat_templates_in_all_their_places(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    assert FolderFiles(folder).chat_template is None
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "plain"}))
    assert FolderFiles(folder).chat_template == "plain"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "usual"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert FolderFiles(folder).chat_template == "usual"
    config.write_text(json.dumps({"chat_template": named[:1]}))
    assert FolderFiles(folder).chat_template == "tools"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert FolderFiles(folder).chat_template == "json"
    (folder / "chat_template.jinja").write_text("jinja é")
    assert FolderFiles(folder).chat_template == "jinja é"
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").unlink()
    for bad in (3, [{"name": "default"}], [["x"]], {"default": "x"}):
        config.write_text(json.dumps({"chat_template": bad}))
        with pytest.raises(ModelFileError, match="neither a text nor a list"):
            FolderFiles(folder)


def write_raw(path: Path, header: Any, data: bytes, size: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if size is None else size) + raw + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"t": entry()}, 2**63, "cannot fit"),
        ({"t": entry()}, 2**64 - 1, "cannot fit"),
        ({"t": entry()}, 3, "not valid JSON"),
        (b"", None, "not valid JSON"),
        (b"[]", None, "no JSON object"),
        (b'{"t": 1, "t": 2}', None, "'t' twice"),
        ({"t": 1}, None, "is no object"),
        ({"t": {}}, None, "unknown dtype None"),
        ({"t": entry(dtype="F128")}, None, "unknown dtype 'F128'"),
        ({"t": entry(dtype=["F32"])}, None, "unknown dtype"),
        ({"t": entry(shape=None)}, None, "impossible shape"),
        ({"t": entry(shape=[-2])}, None, "impossible shape"),
        ({"t": entry(shape=[2.0])}, None, "impossible shape"),
        ({"t": entry(shape=[True, 2])}, None, "impossible shape"),
        ({"t": entry(shape=[1] * 9)}, None, "impossible shape"),
        ({"t": entry(shape=[2**62, 8])}, None, "does not take 8 bytes"),
        ({"t": entry(shape=[2**32, 2**32])}, None, "does not take 8 bytes"),
        ({"t": entry(shape=[3])}, None, "does not take 8 bytes"),
        ({"t": entry(dtype="F4", shape=[15])}, None, "does not take 8 bytes"),
        ({"t": entry(end=12, shape=[3])}, None, "outside the 8 bytes"),
        ({"t": entry(begin=8, end=0)}, None, "outside the 8 bytes"),
        ({"t": entry(begin=-8, end=0)}, None, "outside the 8 bytes"),
        ({"t": entry(begin=4, end=8, shape=[1])}, None, "leaves a hole"),
        ({"t": entry(end=4, shape=[1])}, None, "take 4 bytes, but the file has 8"),
        ({"t": entry(), "u": entry(begin=4, end=8, shape=[1])}, None, "overlaps"),
        ({}, None, "take 0 bytes"),
    ],
)
def test_cve_2025_53630_lying_safetensors_headers_are_refused(
    tmp_path: Path, header: Any, size: int | None, message: str
) -> None:
    path = write_raw(tmp_path / "m.safetensors", header, b"\1" * 8, size)
    with pytest.raises(ModelFileError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


def test_packed_4_bit_floats_are_measured_in_bits(tmp_path: Path) -> None:
    file = SafetensorsFile(
        write_raw(tmp_path / "m.safetensors", {"t": entry(dtype="F4", shape=[4, 4])}, b"\1" * 8)
    )
    assert file.read("t").nbytes == 8


def test_every_safetensors_truncation_is_refused(tmp_path: Path) -> None:
    whole = (make_folder(tmp_path) / "model.safetensors").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "cut.safetensors").write_bytes(whole[:size])
        with pytest.raises(ModelFileError):
            SafetensorsFile(tmp_path / "cut.safetensors")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 255)), min_size=1, max_size=4),
    insert=st.tuples(
        st.integers(8, 300), st.sampled_from([b"", b"9" * 20, b"-", b"]", b"{", b"null", b"\xff"])
    ),
)
def test_fuzz_damaged_safetensors(
    tmp_path: Path, changes: list[tuple[int, int]], insert: tuple[int, bytes]
) -> None:
    source = tmp_path / "model.safetensors"
    if not source.exists():
        make_folder(tmp_path)
    raw = bytearray(source.read_bytes())
    for at, value in changes:
        raw[at % len(raw)] ^= value
    raw[insert[0] : insert[0]] = insert[1]
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(bytes(raw))
    try:
        file = SafetensorsFile(path)
    except ModelFileError as error:
        assert str(path) in str(error)
        return
    for name, info in file.tensors.items():
        assert file.read(name).nbytes == info.nbytes <= len(raw)


def test_dummy_models(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    files = open_model(str(folder), load_format="dummy")
    assert files.format == "dummy" and files.tensors == {} and files.config["hidden_size"] == 8
    with pytest.raises(ModelFileError, match="has no tensor 'a'"):
        files.read("a")
    files.close()
    given = open_dummy({"model_type": "llama"}, "mine")
    assert (given.name, given.config) == ("mine", {"model_type": "llama"})
    with pytest.raises(ModelFileError, match=r"needs a folder with config\.json or a preset"):
        open_dummy(tmp_path / "nowhere")


def test_presets_have_the_published_shapes() -> None:
    """Parameter counts as published: 8.03 and 0.6 billion (0.596 with tied embeddings)."""

    def parameters(c: Any) -> int:
        width, heads, kv, dim = (
            c["hidden_size"],
            c["num_attention_heads"],
            c["num_key_value_heads"],
            c["head_dim"],
        )
        layer = width * dim * (2 * heads + 2 * kv) + 3 * width * c["intermediate_size"] + 2 * width
        layer += 2 * dim if c["model_type"] == "qwen3" else 0
        embeddings = c["vocab_size"] * width * (1 if c["tie_word_embeddings"] else 2)
        return int(c["num_hidden_layers"] * layer + embeddings + width)

    assert parameters(open_model("llama-3.1-8b", load_format="dummy").config) == 8_030_261_248
    assert parameters(open_model("Qwen3-0.6B", load_format="dummy").config) == 596_049_920
    assert {"llama-3.1-8b", "qwen3-0.6b"} <= set(PRESETS)
