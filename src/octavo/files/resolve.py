"""From a model's name to its opened files: local path, our cache, catalogue, hub, in this order."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.errors import ModelFileError, ModelNotFoundError, UsageError
from octavo.files.base import ModelFiles
from octavo.files.catalogue import ENTRIES, CatalogueEntry, find_entry
from octavo.files.dummy import PRESETS, open_dummy
from octavo.files.fetch import Progress, cache_folder, cached_file, fetch
from octavo.files.folder import FolderFiles
from octavo.files.gguf import GGUFFile
from octavo.files.headers import open_headers
from octavo.files.hub import cached_snapshot, fetch_snapshot, parse_hub_name

LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")


def open_model(
    name: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    load_format: str = "auto",
    progress: Progress | None = None,
) -> ModelFiles:
    """Open the model called ``name``: a folder, a .gguf file, a catalogue name or a hub id (downloaded if needed).

    ``progress(phase, bytes_done, bytes_in_all)`` is called while something is fetched. Raises ``ModelNotFoundError``
    naming every place that was looked at, ``ModelFileError`` for a file that is damaged or not supported, and
    ``UsageError`` for a load format the files do not have.
    """
    if load_format not in LOAD_FORMATS:
        raise UsageError(
            f"--load-format {load_format!r} is unknown.", f"Use one of {', '.join(LOAD_FORMATS)}."
        )
    if load_format == "dummy":
        return _open_dummy(name, revision, download_dir)
    files = _open_path(_locate(name, revision, download_dir, progress, fresh=False), name)
    if load_format not in ("auto", files.format):
        files.close()
        raise UsageError(
            f"{name} is a {files.format} model, not {load_format}.", "Leave --load-format at auto."
        )
    return files


def open_description(
    name: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    endpoint: str | None = None,
    progress: Progress | None = None,
) -> ModelFiles:
    """What describes the model called ``name``: its configuration and, where they can be had, its tensors' headers.

    Like ``open_model``, but no weights are downloaded from the hub, a folder may hold a config.json alone, and
    presets go by their name. Catalogue models are fetched: they are small.
    """
    if name.lower() in PRESETS and not Path(name).exists():
        return open_dummy(name.lower(), name)
    path = Path(name).expanduser()
    if path.is_dir() and (path / "config.json").exists() and not any(path.glob("*.safetensors")):
        return open_dummy(path, name)
    if path.exists() or find_entry(name) or not parse_hub_name(name) or name.endswith(".gguf"):
        return open_model(name, revision=revision, download_dir=download_dir, progress=progress)
    found = cached_snapshot(name, revision, download_dir)
    return _open_path(found, name) if found else open_headers(name, revision, endpoint)


def pull(
    name: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Fetch the model called ``name`` (for a hub id: look for a newer revision too) and return where it lies."""
    return _locate(name, revision, download_dir, progress, fresh=True)


def list_catalogue() -> tuple[CatalogueEntry, ...]:
    """The models with short names."""
    return ENTRIES


def is_cached(entry: CatalogueEntry, download_dir: str | None = None) -> bool:
    """Whether a catalogue model has been fetched already."""
    return cached_file(entry, cache_folder(download_dir)) is not None


def _locate(
    name: str, revision: str | None, download_dir: str | None, progress: Progress | None, fresh: bool
) -> Path:
    """The local file or folder of a model, fetched if that is what it takes."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    entry = find_entry(name)
    if entry:
        folder = cache_folder(download_dir)
        return cached_file(entry, folder) or fetch(entry, folder, progress)
    if parse_hub_name(name) and not name.endswith(".gguf"):
        if progress:
            progress("download", 0, 0)
        return fetch_snapshot(name, revision=revision, download_dir=download_dir, use_cached=not fresh)
    raise _not_found(name, path, download_dir)


def _not_found(name: str, path: Path, download_dir: str | None) -> ModelNotFoundError:
    names = [entry.name for entry in ENTRIES]
    looked = [f"the path {path}", f"the catalogue ({', '.join(names)}; kept in {cache_folder(download_dir)})"]
    hub = "the hub was not asked: its ids look like org/name"
    near = difflib.get_close_matches(name.lower(), names, n=2, cutoff=0.5)
    near += [n for n in names if n.split(":")[0] == name.lower() and n not in near]
    cure = f"Did you mean {' or '.join(near)}?" if near else "Give a model folder, a .gguf file or a hub id."
    return ModelNotFoundError(f"No model {name!r}. Looked at {' and '.join(looked)}; {hub}.", cure)


def _open_path(path: Path, name: str) -> ModelFiles:
    if not path.is_dir():
        files = GGUFFile(path, name)
        _add_defaults(files, find_entry(name))
        return files
    ggufs = sorted(p for p in path.iterdir() if p.suffix == ".gguf")
    if (path / "config.json").exists() or not ggufs:
        return FolderFiles(path, name)
    if len(ggufs) > 1:
        raise ModelFileError(
            f"{path} holds several GGUF files: {', '.join(p.name for p in ggufs[:8])}.",
            "Give the path of one of them.",
        )
    return GGUFFile(ggufs[0], name)


def _add_defaults(files: GGUFFile, entry: CatalogueEntry | None) -> None:
    """What the file itself advises goes before the catalogue's sampling defaults."""
    if entry and files.path.name == entry.filename:
        merged: Mapping[str, Any] = {**entry.generation_config, **files.generation_config}
        files.generation_config = merged


def _open_dummy(name: str, revision: str | None, download_dir: str | None) -> ModelFiles:
    path = Path(name).expanduser()
    if path.is_dir():
        return open_dummy(path, name)
    if name.lower() in PRESETS:
        return open_dummy(name.lower(), name)
    if path.exists() or find_entry(name) or not parse_hub_name(name):
        raise ModelFileError(
            f"--load-format dummy needs a folder with config.json, a hub id or a preset, not {name}.",
            f"Presets: {', '.join(PRESETS)}.",
        )
    folder = fetch_snapshot(name, revision=revision, download_dir=download_dir, weights=False)
    return open_dummy(folder, name)
