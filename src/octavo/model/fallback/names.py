"""Checkpoints that name their tensors in an older way than transformers' modules do: transformers knows the names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.files.base import ModelFiles, TensorInfo


class RenamedFiles:
    """A model's files (see ``ModelFiles``) with some tensors under other names: ``names`` maps new to stored."""

    def __init__(self, files: ModelFiles, names: Mapping[str, str]) -> None:
        self.files = files
        self.names = names
        self.name: str = files.name
        self.path: Path = files.path
        self.format: str = files.format
        self.config: Mapping[str, Any] = files.config
        self.generation_config: Mapping[str, Any] = files.generation_config
        self.chat_template: str | None = files.chat_template
        self.tensors: Mapping[str, TensorInfo] = {
            new: replace(files.tensors[stored], name=new) for new, stored in names.items()
        }

    def read(self, name: str) -> NDArray[np.uint8]:
        """See ``ModelFiles``."""
        return self.files.read(self.names[name])

    def close(self) -> None:
        """See ``ModelFiles``."""
        self.files.close()


def renamed(files: ModelFiles, model: Any, known: Collection[str]) -> ModelFiles:
    """The files as ``model``'s modules name their tensors; names that are ``known`` already stay."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    names: dict[str, str] = {}
    for stored in sorted(files.tensors):
        new = stored
        if stored not in known:
            for rule in rules:
                new = rule.rename_source_key(new)[0]
        names.setdefault(new, stored)
    changed = len(names) == len(files.tensors) and any(new != stored for new, stored in names.items())
    return RenamedFiles(files, names) if changed else files
