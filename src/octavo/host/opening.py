"""Finding and opening the model that the options name. No torch."""

from __future__ import annotations

import msgspec

from octavo.config import EngineOptions
from octavo.errors import UsageError
from octavo.files.base import ModelFiles
from octavo.files.fetch import Progress
from octavo.files.resolve import open_description, open_model


def open_files(options: EngineOptions, progress: Progress | None = None) -> ModelFiles:
    """Find and open the model the options name, fetching it where that is needed."""
    model = options.model
    files = open_model(
        model.model,
        revision=model.revision,
        download_dir=model.download_dir,
        load_format=model.load_format,
        progress=progress,
    )
    return files if model.hf_overrides is None else override(files, model.hf_overrides)


def open_headers(options: EngineOptions, progress: Progress | None = None) -> ModelFiles:
    """What describes the model the options name, without weights that would have to be downloaded."""
    model = options.model
    files = open_description(
        model.model, revision=model.revision, download_dir=model.download_dir, progress=progress
    )
    return files if model.hf_overrides is None else override(files, model.hf_overrides)


def override(files: ModelFiles, overrides: str) -> ModelFiles:
    """The same files with values of config.json replaced by those of a JSON object."""
    try:
        values = msgspec.json.decode(overrides, type=dict[str, object])
    except msgspec.DecodeError as error:
        raise UsageError(f"--hf-overrides is not a JSON object: {error}.") from None
    if files.format == "gguf":
        raise UsageError(
            "--hf-overrides is for models with a config.json; this is a GGUF file.", "Leave it out."
        )
    files.config = {**files.config, **values}
    return files
