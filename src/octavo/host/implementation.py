"""Whose model code runs: Octavo's own families, or transformers' modules where there is none."""

from __future__ import annotations

from collections.abc import Mapping

from octavo.config import ModelOptions
from octavo.errors import ModelFileError, UnsupportedModelError, UsageError
from octavo.files.base import ModelFiles
from octavo.model.arch import ArchConfig
from octavo.model.describe import (
    ALIASES,
    describe,
    describe_encoder,
    is_encoder,
    supported,
    unknown_architecture,
)
from octavo.model.fallback.describe import transformers_arch
from octavo.model.read_arch import read_arch


def architecture(options: ModelOptions, files: ModelFiles) -> ArchConfig:
    """The model's architecture as the implementation reads it that ``--model-impl`` asks for.

    "auto" takes transformers only where Octavo refuses the model, and tells Octavo's reason where transformers cannot
    run it either. Raises ``UnsupportedModelError``.
    """
    if options.model_impl == "transformers":
        if options.quantization is not None:
            raise UsageError(
                f"--quantization {options.quantization} does not cover models that transformers computes.",
                "Leave it out, or use --model-impl octavo.",
            )
        return transformers_arch(files)
    try:
        return own_architecture(files)
    except UnsupportedModelError as ours:
        if options.model_impl == "octavo" or options.quantization is not None:
            raise
        try:
            return transformers_arch(files)
        except UnsupportedModelError as theirs:
            cure = f"{ours.cure or ''} transformers cannot run it either: {theirs.cause}".strip()
            raise UnsupportedModelError(ours.cause, cure) from None


def own_architecture(files: ModelFiles) -> ArchConfig:
    """The architecture as one of Octavo's families; an unknown one is named before what its configuration lacks."""
    try:
        arch = read_arch(files)
    except ModelFileError:
        nested = files.config.get("text_config")
        names = [
            files.config.get("model_type"),
            nested.get("model_type") if isinstance(nested, Mapping) else None,
        ]
        known = files.format == "gguf" or any(ALIASES.get(str(name), name) in supported() for name in names)
        if known or not isinstance(names[0], str):
            raise
        raise unknown_architecture(names[0]) from None
    if is_encoder(arch):
        describe_encoder(arch)
    else:
        describe(arch)
    return arch
