"""Headers of hub models by range requests: the same description as from the whole files, few bytes sent."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from fake_hub import Hub, fake_hub

from octavo.config import EngineOptions
from octavo.device.platform.gpus import find_gpu
from octavo.errors import ModelFileError, ModelNotFoundError
from octavo.files import headers
from octavo.files.gguf_write import write_gguf
from octavo.files.headers import open_headers
from octavo.files.resolve import open_description, open_model
from octavo.host.plan import Planner
from octavo.model.footprint import DENSE

CONFIG = b'{"model_type": "llama"}'
SIZE = 1 << 20  # elements of each shard's one tensor


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with fake_hub() as running:
        yield running


def shard(name: str, padding: int = 0) -> bytes:
    entry = {name: {"dtype": "F32", "shape": [SIZE], "data_offsets": [0, 4 * SIZE]}}
    header = json.dumps(entry).encode() + b" " * padding
    return struct.pack("<Q", len(header)) + header + b"\1" * (4 * SIZE)


def sharded(padding: int = 0) -> dict[str, bytes]:
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = json.dumps({"weight_map": names}).encode()
    shards = {file: shard(tensor, padding) for tensor, file in names.items()}
    return {"config.json": CONFIG, "model.safetensors.index.json": index, **shards}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("padding", [0, headers.FIRST_BYTES + 5])
def test_headers_equal_the_whole_files(hub: Hub, tmp_path: Path, padding: int) -> None:
    hub.files = sharded(padding)
    write(tmp_path, hub.files)
    remote, local = open_headers("org/name", endpoint=hub.url), open_model(str(tmp_path))
    assert remote.tensors == local.tensors and remote.config == local.config
    assert hub.sent_bytes < 2 * (headers.FIRST_BYTES + padding) + 4096 < 4 * SIZE
    with pytest.raises(ModelFileError, match="only headers were fetched"):
        remote.read("a")


def test_a_server_without_ranges_works_too(hub: Hub) -> None:
    hub.files, hub.ranges = sharded(headers.FIRST_BYTES + 5), False
    assert set(open_headers("org/name", endpoint=hub.url).tensors) == {"a", "b"}


def test_gguf_headers_of_any_length(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "FIRST_BYTES", 16)  # cut everywhere: 64, 256, 1024, ... bytes
    vocabulary = [f"wörd{i}" for i in range(900)]
    metadata = {"general.architecture": "llama", "tokenizer.ggml.tokens": vocabulary, "a.b": [1.5] * 70}
    tensors = {f"blk.{i}.weight": np.full((8, 64), i, np.float32) for i in range(40)}
    write_gguf(tmp_path / "x-Q8_0.gguf", metadata, tensors)
    hub.files = {"x-Q8_0.gguf": (tmp_path / "x-Q8_0.gguf").read_bytes(), "x-Q4_0.gguf": b"other"}
    remote, local = open_headers("org/name:Q8_0", endpoint=hub.url), open_model(str(tmp_path / "x-Q8_0.gguf"))
    assert remote.tensors == local.tensors and remote.config == local.config
    assert (remote.read("blk.7.weight") == local.read("blk.7.weight")).all()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": CONFIG}, "no weights"),
        ({"config.json": CONFIG, "pytorch_model.bin": b"x"}, "a pickle"),
        ({"model.safetensors": shard("a")}, "no config.json"),
        ({"config.json": CONFIG, "model.safetensors": b"\xff" * 64}, "cannot fit in this file"),
        ({"config.json": CONFIG, "model.safetensors": b"ab"}, "too few"),
        ({**sharded(), "model-00001-of-00002.safetensors": shard("c")}, "expects tensor 'a'"),
        ({"config.json": b"[]", "model.safetensors": shard("a")}, "no JSON object"),
    ],
)
def test_damaged_repositories_are_named(hub: Hub, files: dict[str, bytes], message: str) -> None:
    hub.files = files
    with pytest.raises(ModelFileError, match=message):
        open_headers("org/name", endpoint=hub.url)


def test_errors_name_cause_and_cure(hub: Hub) -> None:
    hub.files = {"x-Q4_K_M.gguf": b"GGUF" + b"\xff" * 100}
    for name, message in (
        ("org/name:Q8_0", "It has: x-Q4_K_M.gguf"),
        ("org/name:Q4_K_M", "is not supported"),
    ):
        with pytest.raises(ModelFileError, match=message):
            open_headers(name, endpoint=hub.url)
    hub.status = 401
    with pytest.raises(ModelNotFoundError, match="does not exist or is private"):
        open_headers("org/name", endpoint=hub.url)


def test_a_plan_needs_a_few_hundred_kilobytes(hub: Hub, tmp_path: Path) -> None:
    """The same figures as from the files themselves."""
    config = {
        "model_type": "qwen3", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 8192,
    }  # fmt: skip
    hub.files = {**sharded(), "config.json": json.dumps(config).encode()}
    write(tmp_path, hub.files)
    options = EngineOptions.of(model="org/name")
    remote, local = open_headers("org/name", endpoint=hub.url), open_model(str(tmp_path))
    card = find_gpu("l4")
    assert Planner(options, remote).case(card, DENSE, 1) == Planner(options, local).case(card, DENSE, 1)
    assert hub.sent_bytes < 1 << 20 < sum(map(len, hub.files.values()))


def test_a_folder_with_a_configuration_alone_is_described(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(CONFIG)
    assert open_description(str(tmp_path)).config == {"model_type": "llama"}
    assert open_description("llama-3.1-8b").config["num_hidden_layers"] == 32
