"""Advisories about model files: what is read, what is refused, and that nothing in them runs."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
from test_folder import edit_index, make_folder
from test_gguf import LIES, METADATA, raw_file, small_file
from test_text_template import INJECTIONS

from octavo.api.text.template import ChatTemplate
from octavo.errors import ModelFileError, OctavoError, RequestError
from octavo.files.catalogue import ENTRIES
from octavo.files.folder import FolderFiles
from octavo.files.gguf import GGUFFile
from octavo.files.gguf_write import write_gguf
from octavo.files.hub import parse_hub_name
from octavo.files.resolve import open_model
from octavo.model.read_arch import read_arch

CODE = "import pathlib; pathlib.Path({canary!r}).touch()"
EVIL = (
    "evil.py",
    "__init__.py",
    "modeling_llama.py",
    "configuration_llama.py",
    "tokenization_llama.py",
    "setup.py",
)


def booby_trapped(tmp_path: Path, **config: Any) -> tuple[Path, Path]:
    """A model folder in which every name that could be imported touches a canary."""
    folder, canary = make_folder(tmp_path / "model", **config), tmp_path / "canary"
    for name in EVIL:
        (folder / name).write_text(CODE.format(canary=str(canary)))
    return folder, canary


def test_07_cve_2025_24357_pickles_are_refused_whatever_they_are_called(tmp_path: Path) -> None:
    payload = b"cposix\nsystem\n(S'touch canary'\ntR."
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt"):
        folder = make_folder(tmp_path / name)
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(payload)
        with pytest.raises(ModelFileError):
            FolderFiles(folder)
    for name in ("model.safetensors", "model.gguf"):  # a pickle or a zip under a harmless name
        folder = make_folder(tmp_path / f"as-{name}")
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(payload)
        with pytest.raises(ModelFileError):
            open_model(str(folder / name) if name.endswith("gguf") else str(folder))
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("archive/data.pkl", payload)
        with pytest.raises(ModelFileError):
            open_model(str(folder / name) if name.endswith("gguf") else str(folder))
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "org/repo--evil.Model"}},
        {"auto_map": {"AutoTokenizer": ["evil.Tok", None]}, "tokenizer_class": "evil.Tok"},
        {"trust_remote_code": True, "custom_pipelines": {"x": {"impl": "evil.P"}}},
        {"architectures": ["evil.Model"], "processor_class": "evil.Processor"},
    ],
    ids=["auto_map", "tokenizer", "flag", "processor"],
)
def test_10_cve_2025_66448_code_beside_a_model_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    """Also rows 12 and 40: processors, tokenizers, and every fallback."""
    folder, canary = booby_trapped(tmp_path, **config)
    monkeypatch.chdir(folder)
    files = open_model(str(folder))
    for use in (lambda: read_arch(files), lambda: ChatTemplate(files.chat_template)):
        try:
            use()
        except OctavoError:
            continue
    assert not canary.exists()


def test_12_cve_2026_90553_there_is_no_processor_to_load(tmp_path: Path) -> None:
    folder, canary = booby_trapped(tmp_path, auto_map={"AutoProcessor": "evil.Processor"})
    (folder / "preprocessor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "evil.P"}}))
    open_model(str(folder))
    assert not canary.exists()


@pytest.mark.parametrize("source", INJECTIONS)
def test_36_cve_2026_5760_templates_out_of_gguf_stay_in_the_sandbox(tmp_path: Path, source: str) -> None:
    """Also CVE-2024-34359: the template travels in the file's metadata to the one place that renders."""
    path = tmp_path / "m.gguf"
    write_gguf(path, {**METADATA, "tokenizer.chat_template": source})
    found = GGUFFile(path).chat_template
    assert found == source
    marks = ("<class", "<module", "<function", "<built-in", "uid=", "root:")
    try:
        text = ChatTemplate(found).render([{"role": "user", "content": "x"}])
    except (RequestError, ModelFileError):
        return
    assert not any(mark in text for mark in marks), text


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../x/y",
            "x/../../y",
            "/etc/passwd",
            "x/y/z",
            "x\\y/z",
            "x/..",
            "./x/y",
            "x/y\0",
            "x//y",
            "x/y?z",
            "x/y#z",
            " x/y",
        ),
        *(
            "x/y@../z",
            "~/x",
            "http://evil/x",
            "x:y/z",
            "-x/y",
            "x/-y",
            "x/y--z",
            "x/" + "y" * 500,
            "",
            "/",
            "x/y.git",
        ),
    ],
)
def test_42_cve_2024_45436_no_name_becomes_a_path(tmp_path: Path, name: str) -> None:
    """Hub names either are plain names or are no hub names at all."""
    found = parse_hub_name(name)
    if found is not None:
        text = "/".join(
            str(part) for part in (found if isinstance(found, tuple) else vars(found).values()) if part
        )
        assert (
            ".." not in text
            and "\\" not in text
            and "\0" not in text
            and not text.startswith(("/", "~", "."))
        )


def test_42_cve_2026_7020_shards_stay_inside(tmp_path: Path) -> None:
    outside = tmp_path / "secret.safetensors"
    folder = make_folder(tmp_path / "model", shards=True)
    outside.write_bytes((next(folder.glob("*.safetensors"))).read_bytes())
    for name in (
        "../secret.safetensors",
        str(outside),
        "./../secret.safetensors",
        "model/../../secret.safetensors",
    ):
        edit_index(folder, a=name)
        with pytest.raises(ModelFileError, match="outside the model folder"):
            FolderFiles(folder)


EDGES = (0, 1, 7, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def gguf_survives(path: Path) -> None:
    """A file is refused with ``ModelFileError``, or everything it promises can be read inside of it."""
    try:
        file = GGUFFile(path)
    except ModelFileError:
        return
    size = path.stat().st_size
    for name, info in file.tensors.items():
        assert file.read(name).nbytes == info.nbytes <= size


def test_43_cve_2026_7482_gguf_fuzz(tmp_path: Path, record_property: Any) -> None:
    """Bytes, integers, cuts and insertions, several at a time; what is accepted never reads beyond the file."""
    rng, whole, tried = random.Random(11), small_file(tmp_path / "m.gguf").read_bytes(), 4000
    head = min(len(whole), 1200)
    path = tmp_path / "fuzz.gguf"
    for _ in range(tried):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 5)):
            at, kind = rng.randrange(head - 8), rng.random()
            if kind < 0.5:
                data[at] = rng.randrange(256)
            elif kind < 0.8:
                data[at : at + 8] = struct.pack("<Q", rng.choice(EDGES))
            elif kind < 0.9:
                data[at : at + 4] = struct.pack("<I", rng.choice(EDGES) & 0xFFFFFFFF)
            elif kind < 0.95:
                del data[at : at + rng.randint(1, 40)]
            else:
                data[at:at] = rng.randbytes(rng.randint(1, 40))
        path.write_bytes(data)
        gguf_survives(path)
    record_property("inputs", tried)


@pytest.mark.parametrize("lie", sorted(LIES))
def test_44_cve_2024_39720_every_lie_is_refused(tmp_path: Path, lie: str) -> None:
    """Also CVE-2024-12055, CVE-2025-0312, -0315, -0317, CVE-2024-8063, CVE-2025-1975."""
    with pytest.raises(ModelFileError):
        GGUFFile(raw_file(tmp_path / "m.gguf", **LIES[lie][0]))


def test_49_cve_2025_53630_sizes_whose_product_overflows(tmp_path: Path, record_property: Any) -> None:
    tried = 0
    for kind in range(40):
        for dims in (
            *(
                (2**32, 2**32),
                (2**63, 2),
                (2**62, 4, 8),
                (2**64 - 1,),
                (2**33, 2**31),
                (32, 2**59),
                (2**16,) * 4,
            ),
            *((0,), (0, 2**64 - 1), (32, 0), (2**64 - 32,), (1, 1, 1, 2**64 - 1)),
        ):
            for offset in (0, 32, 2**63, 2**64 - 32):
                gguf_survives(raw_file(tmp_path / "m.gguf", dims=dims, kind=kind, offset=offset))
                tried += 1
    record_property("inputs", tried)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_52_cve_2026_75104_only_regular_files(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", shards=True)
    os.mkfifo(folder / "pipe.safetensors")
    edit_index(folder, a="pipe.safetensors")
    with pytest.raises(ModelFileError, match="not a regular file"):
        FolderFiles(folder)
    (folder / "device.safetensors").symlink_to("/dev/zero")
    edit_index(folder, a="device.safetensors")
    with pytest.raises(ModelFileError):
        FolderFiles(folder)


def test_53_cve_2026_4372_no_key_of_a_config_fetches_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, canary = booby_trapped(
        tmp_path,
        **dict.fromkeys(
            (
                *(
                    "_name_or_path",
                    "base_model_name_or_path",
                    "auto_map",
                    "tokenizer_file",
                    "chat_template_url",
                ),
                *("adapter_path", "quantization_config_url", "text_config_path", "$ref", "import", "resolve"),
            ),
            "https://127.0.0.1:1/evil",
        ),
    )

    def caught(*args: Any, **_: Any) -> Any:
        raise AssertionError(f"a connection was opened: {args}")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, caught)
    monkeypatch.setattr(socket.socket, "connect", caught)
    files = open_model(str(folder))
    try:
        read_arch(files)
    except OctavoError:
        pass
    assert not canary.exists()


def test_41_cve_2024_37032_digests_and_names_are_pinned_and_plain() -> None:
    """Nothing that a server says becomes a path: the catalogue pins the digest and the name of every file."""
    for entry in ENTRIES:
        pinned = [(one.path, one.sha256) for one in entry.members]
        if not pinned:
            pinned = [(part.member, part.sha256) for part in entry.parts] + [(entry.filename, entry.sha256)]
        for name, digest in [*pinned, *((part.member, "0" * 64) for part in entry.parts)]:
            assert re.fullmatch("[0-9a-f]{64}", digest), (entry.name, name)
            assert not Path(name).is_absolute() and ".." not in Path(name).parts and "\\" not in name
