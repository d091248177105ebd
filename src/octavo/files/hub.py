"""Models of the Hugging Face hub ("org/name", "org/name:Q4_K_M" for one GGUF file of a repository).

``huggingface_hub`` is imported only here and only when a hub name is used: it costs a quarter of a second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeVar

from octavo.errors import ModelFileError, ModelNotFoundError

HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?::([\w.-]{1,64}))?")
TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
WEIGHT_FILES = ("*.safetensors",)
# Weights once more in another form, which would only cost time and disk.
IGNORED = ("original/*", "consolidated*", "onnx/*", "openvino/*", "coreml/*", "tensorrt/*")

Snapshot = Callable[..., Any]
FilePath = TypeVar("FilePath", bound=PurePath)


def parse_hub_name(name: str) -> tuple[str, str | None] | None:
    """("org/name", quantization or None), or None where ``name`` cannot be a hub id."""
    match = HUB_NAME.fullmatch(name)
    return (match[1], match[2]) if match else None


def fetch_snapshot(
    name: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    weights: bool = True,
    use_cached: bool = True,
    snapshot: Snapshot | None = None,
) -> Path:
    """The folder (or the .gguf file, for "org/name:QUANT") of a hub model, downloaded where needed.

    ``weights=False`` takes only configuration and tokenizer. ``use_cached`` takes a complete snapshot from the hub
    cache without asking the hub, so that a start needs no network. ``snapshot`` replaces
    ``huggingface_hub.snapshot_download`` in tests. Raises ``ModelNotFoundError`` or ``ModelFileError``.
    """
    if use_cached:
        found = cached_snapshot(name, revision, download_dir, weights, snapshot)
        if found:
            return found
    repo, quantization, arguments = _request(name, revision, download_dir, weights)
    call = snapshot or _library_snapshot()
    try:
        folder = Path(call(**arguments))
    except Exception as error:
        explained = explain(error, repo, revision)
        if explained is None:
            raise
        raise explained from None
    found = _choose(folder, name, quantization, weights)
    if found is None:
        raise _nothing_usable(folder, repo, quantization)
    return found


def cached_snapshot(
    name: str,
    revision: str | None = None,
    download_dir: str | None = None,
    weights: bool = True,
    snapshot: Snapshot | None = None,
) -> Path | None:
    """What ``fetch_snapshot`` would return where that is complete in the hub cache, else None; asks no network."""
    _, quantization, arguments = _request(name, revision, download_dir, weights)
    call = snapshot or _library_snapshot()
    try:
        return _choose(Path(call(**arguments, local_files_only=True)), name, quantization, weights)
    except Exception as error:
        if not is_hub_error(error):
            raise
    return None


def _request(
    name: str, revision: str | None, download_dir: str | None, weights: bool
) -> tuple[str, str | None, dict[str, Any]]:
    """(repository, quantization, arguments of the library's call)."""
    parsed = parse_hub_name(name)
    if parsed is None:
        raise ModelNotFoundError(f"{name!r} is no hub id.", "Hub ids look like org/name or org/name:Q4_K_M.")
    repo, quantization = parsed
    arguments: dict[str, Any] = {
        "repo_id": repo,
        "revision": revision,
        "cache_dir": download_dir,
        "allow_patterns": _patterns(quantization, weights),
        "ignore_patterns": list(IGNORED),
    }
    return repo, quantization, arguments


def _library_snapshot() -> Snapshot:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelFileError(
            "Hub models need the package huggingface-hub.",
            "Install it, or give a local folder or .gguf file.",
        ) from None
    found: Snapshot = snapshot_download
    return found


def _patterns(quantization: str | None, weights: bool) -> list[str]:
    if quantization:
        return [
            f"*{form}*.gguf" for form in sorted({quantization, quantization.lower(), quantization.upper()})
        ]
    return [*TEXT_FILES, *(WEIGHT_FILES if weights else ())]


def _choose(folder: Path, name: str, quantization: str | None, weights: bool) -> Path | None:
    """What to open in a snapshot, or None where it is incomplete."""
    if quantization is None:
        has_weights = any(folder.glob("*.safetensors"))
        complete = (
            (folder / "config.json").exists() and (has_weights or not weights) and _has_all_shards(folder)
        )
        return folder if complete or (not weights and (folder / "config.json").exists()) else None
    return pick_gguf(sorted(folder.rglob("*.gguf")), name, quantization)


def pick_gguf(files: Sequence[FilePath], name: str, quantization: str) -> FilePath | None:
    """The one file whose name has the quantization, or None; raises ``ModelFileError`` where several have."""
    files = [p for p in files if quantization.lower() in p.name.lower()]
    # "Q4_K" must not be ambiguous with Q4_K_M and Q4_K_S: the exact word wins.
    exact = [p for p in files if re.split(r"[-.]", p.stem.lower())[-1] == quantization.lower()]
    files = exact or files
    if len(files) > 1:
        raise ModelFileError(
            f"{name} is ambiguous: {', '.join(p.name for p in files[:8])}.", "Name the quantization in full."
        )
    return files[0] if files else None


def _has_all_shards(folder: Path) -> bool:
    """Whether the shards counted in names like model-00001-of-00003.safetensors are all there."""
    shards = [p.name for p in folder.glob("*-of-*.safetensors")]
    counts = {int(m[1]) for n in shards if (m := re.search(r"-of-(\d{1,6})\.safetensors$", n))}
    return not shards or (len(counts) == 1 and len(shards) == counts.pop())


def _nothing_usable(folder: Path, repo: str, quantization: str | None) -> ModelFileError:
    if quantization:
        return ModelNotFoundError(
            f"{repo} on the hub has no .gguf file with {quantization} in its name.",
            "See the repository's file list.",
        )
    return ModelFileError(
        f"{repo} on the hub has no config.json with safetensors weights (pickles are not read).",
        f"For a GGUF repository name the quantization: {repo}:Q4_K_M.",
    )


def is_hub_error(error: Exception) -> bool:
    """Errors of huggingface_hub and of the HTTP clients under it, told by where their classes live."""
    modules = {base.__module__.split(".")[0] for base in type(error).__mro__}
    return bool(modules & {"huggingface_hub", "httpx", "httpx2", "httpcore", "requests"}) or isinstance(
        error, ConnectionError | TimeoutError
    )


def explain(error: Exception, repo: str, revision: str | None) -> ModelFileError | None:
    """The library's error as one sentence with a cure; None for what is no hub error."""
    names = {base.__name__ for base in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "GatedRepoError" in names or status == 403:
        return ModelFileError(
            f"{repo} on the hub is gated: your account has no access.",
            "Accept its terms on its page, then log in: hf auth login (or set HF_TOKEN).",
        )
    if "RevisionNotFoundError" in names:
        return ModelNotFoundError(f"{repo} on the hub has no revision {revision!r}.", "Check --revision.")
    if status == 401:
        return ModelNotFoundError(
            f"{repo} on the hub does not exist or is private (401).",
            "Check the spelling; for a private model log in: hf auth login (or set HF_TOKEN).",
        )
    if "RepositoryNotFoundError" in names or status == 404:
        return ModelNotFoundError(f"{repo} does not exist on the hub.", "Check the spelling.")
    if is_hub_error(error) or isinstance(error, OSError):
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return ModelFileError(
            f"{repo} could not be fetched from the hub, and it is not in the hub cache ({reason}).",
            "Are you offline? Connect once, or give a local folder or .gguf file.",
        )
    return None
