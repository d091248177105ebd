"""Tiny random transformers models, saved once a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import BASE, FAMILIES

from octavo.files.folder import FolderFiles


@dataclass
class Oracle:
    """A transformers model in float32, and the folder it was saved to."""

    model: Any
    path: Path

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[n, V] of one sequence."""
        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([tokens])).logits[0].float()

    def open(self) -> FolderFiles:
        """The folder as our files."""
        return FolderFiles(self.path)


def random_tokens(count: int, seed: int) -> list[int]:
    """Token ids of the tiny vocabulary."""
    return np.random.default_rng(seed).integers(3, BASE["vocab_size"], count).tolist()


def build_oracle(model_type: str, changes: dict[str, Any], path: Path) -> Oracle:
    """A random model with weights large enough that every part of it moves the logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {key: value for key, value in {**BASE, **changes}.items() if value is not None or key in changes}
    if given.get("head_dim", 0) is None:
        del given["head_dim"]
    config = AutoConfig.for_model(model_type, **given)
    config._attn_implementation = "eager"  # the only one with softcaps
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            matrix = parameter.dim() > 1
            parameter.normal_(0.0, 1.2 * parameter.shape[-1] ** -0.5 if matrix else 0.3)
            if "norm" in name and not model_type.startswith("gemma"):
                parameter += 1.0
    model.save_pretrained(path)
    return Oracle(model, path)


@pytest.fixture(scope="session")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    """Row of the parity table -> its oracle."""
    made: dict[str, Oracle] = {}

    def get(row: str) -> Oracle:
        if row not in made:
            made[row] = build_oracle(*FAMILIES[row], tmp_path_factory.mktemp("oracle") / row)
        return made[row]

    return get
