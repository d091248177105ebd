"""Hub models: the real client against a hub on loopback, and its errors as sentences."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
from fake_hub import Hub, fake_hub

from octavo.errors import ModelFileError, ModelNotFoundError
from octavo.files import resolve
from octavo.files.hub import fetch_snapshot, parse_hub_name
from octavo.files.resolve import open_model, pull


def safetensors_bytes() -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * 4


FILES = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b'{"temperature": 0.5}',
    "model.safetensors": safetensors_bytes(),
    "pytorch_model.bin": b"pickle",
    "modeling_evil.py": b"raise SystemExit",
    "original/consolidated.safetensors": b"again",
    "README.md": b"text",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    with fake_hub(**FILES) as running:
        yield running


def client(hub: Hub) -> Callable[..., Any]:
    return partial(huggingface_hub.snapshot_download, endpoint=hub.url, token=False)


def test_hub_names() -> None:
    assert parse_hub_name("org/name") == ("org/name", None)
    assert parse_hub_name("org/na-me.v1:Q4_K_M") == ("org/na-me.v1", "Q4_K_M")
    for name in (
        "name",
        "a/b/c",
        "../b",
        "a/..",
        "/a/b",
        "a/b:",
        "a/b:../c",
        "a b/c",
        "http://a/b",
        "",
        "a/" + "b" * 97,
    ):
        assert parse_hub_name(name) is None


def test_only_what_is_needed_is_downloaded_and_a_second_start_asks_nothing(hub: Hub, tmp_path: Path) -> None:
    folder = fetch_snapshot("org/name", download_dir=str(tmp_path), snapshot=client(hub))
    assert sorted(hub.served) == ["config.json", "generation_config.json", "model.safetensors"]
    files = open_model(str(folder))
    assert set(files.tensors) == {"a"} and files.generation_config == {"temperature": 0.5}
    files.close()
    hub.status = 503  # from now on the hub is down
    assert fetch_snapshot("org/name", download_dir=str(tmp_path), snapshot=client(hub)) == folder


def test_a_snapshot_with_missing_shards_is_completed(hub: Hub, tmp_path: Path) -> None:
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    hub.files |= dict.fromkeys(shards, safetensors_bytes())
    del hub.files["model.safetensors"]
    folder = fetch_snapshot("org/name", download_dir=str(tmp_path), snapshot=client(hub))
    (folder / shards[1]).unlink()
    hub.served.clear()
    assert fetch_snapshot("org/name", download_dir=str(tmp_path), snapshot=client(hub)) == folder
    assert (folder / shards[1]).exists()


def test_a_client_that_does_not_notice_missing_shards(tmp_path: Path) -> None:
    """Clients without a list of the repository's files call any snapshot complete; the names of the shards tell."""
    asked: list[bool] = []

    def snapshot(*, local_files_only: bool = False, **_: Any) -> str:
        asked.append(local_files_only)
        (tmp_path / "config.json").write_text("{}")
        for number in (1,) if local_files_only else (1, 2):
            (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(safetensors_bytes())
        return str(tmp_path)

    assert fetch_snapshot("org/name", snapshot=snapshot) == tmp_path and asked == [True, False]
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_configuration_alone_for_dummy_weights(hub: Hub, tmp_path: Path) -> None:
    folder = fetch_snapshot("org/name", download_dir=str(tmp_path), weights=False, snapshot=client(hub))
    assert sorted(hub.served) == ["config.json", "generation_config.json"]
    assert open_model(str(folder), load_format="dummy").config["model_type"] == "llama"


def test_one_gguf_file_of_a_repository(hub: Hub, tmp_path: Path) -> None:
    hub.files = dict.fromkeys(
        ("m.Q4_K_M.gguf", "m.Q4_K_S.gguf", "m-q8_0.gguf", "m.Q4_K.gguf", "README.md"), b"x"
    )

    def fetch(quantization: str) -> str:
        name = f"org/name:{quantization}"
        return fetch_snapshot(name, download_dir=str(tmp_path / quantization), snapshot=client(hub)).name

    assert fetch("Q8_0") == "m-q8_0.gguf" and hub.served == ["m-q8_0.gguf"]
    assert fetch("q4_k_m") == "m.Q4_K_M.gguf"
    assert fetch("Q4_K") == "m.Q4_K.gguf"
    with pytest.raises(ModelNotFoundError, match=r"no \.gguf file with Q6_K"):
        fetch("Q6_K")
    with pytest.raises(ModelFileError, match="is ambiguous"):
        fetch("4_K_")
    with pytest.raises(ModelFileError, match="name the quantization"):
        fetch_snapshot("org/name", download_dir=str(tmp_path / "none"), snapshot=client(hub))


@pytest.mark.parametrize(
    ("status", "code", "kind", "message"),
    [
        (404, "RepoNotFound", ModelNotFoundError, "org/name does not exist on the hub"),
        (404, "RevisionNotFound", ModelNotFoundError, "no revision 'v9'"),
        (401, "RepoNotFound", ModelNotFoundError, r"private \(401\).*hf auth login"),
        (401, "", ModelNotFoundError, r"private \(401\).*hf auth login"),
        (403, "GatedRepo", ModelFileError, "is gated.*Accept its terms"),
        (400, "", ModelFileError, "could not be fetched"),
    ],
)
def test_refusals_of_the_hub_are_sentences(
    hub: Hub, tmp_path: Path, status: int, code: str, kind: type[ModelFileError], message: str
) -> None:
    hub.status, hub.error_code = status, code
    with pytest.raises(kind, match=message):
        fetch_snapshot("org/name", revision="v9", download_dir=str(tmp_path), snapshot=client(hub))


def test_offline_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelFileError, match=r"could not be fetched .*Are you offline\? Connect once"):
        open_model("org/name", download_dir=str(tmp_path))


def test_programming_errors_are_not_hidden(tmp_path: Path) -> None:
    def broken(**_: Any) -> str:
        raise TypeError("unexpected argument")

    with pytest.raises(TypeError):
        fetch_snapshot("org/name", snapshot=broken)


def test_pull_asks_the_hub_and_open_model_the_cache_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def fetch(name: str, *, use_cached: bool, **_: Any) -> Path:
        asked.append(use_cached)
        (tmp_path / "m.gguf").write_bytes(b"no model")
        return tmp_path / "m.gguf"

    monkeypatch.setattr(resolve, "fetch_snapshot", fetch)
    phases: list[tuple[str, int, int]] = []
    assert pull("org/name:Q8_0", progress=lambda *step: phases.append(step)) == tmp_path / "m.gguf"
    with pytest.raises(ModelFileError, match="no GGUF file"):
        open_model("org/name:Q8_0")
    assert asked == [False, True] and phases == [("download", 0, 0)]
