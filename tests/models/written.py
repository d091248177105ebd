"""Random checkpoints in a family's own names, for architectures that the installed transformers may not have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from octavo.device.ops.bind import Binder, OpSpec
from octavo.model.describe import describe
from octavo.model.layers.load import LoadItem, StoredMatrix
from octavo.model.layers.moe import TokenTable
from octavo.model.network import Network
from octavo.model.read_arch import from_hf


def write_random(config: dict[str, Any], folder: Path, spread: float = 0.08, seed: int = 0) -> Path:
    """config.json and one file of float32 tensors (normal, of that spread), as ``Network`` asks for them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    network = Network(
        describe(from_hf(config)),
        dtype=torch.float32,
        device=torch.device("cpu"),
        binder=Binder(),
        op_spec=OpSpec("cpu", "float32"),
        max_position=8,
    )
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for item in [single for whole in network.items() for single in stored(whole)]:
        if isinstance(item, StoredMatrix):  # of experts by token id
            table: TokenTable = item.take.__self__  # type: ignore[attr-defined]
            drawn = torch.rand((len(table.experts), table.num), generator=generator)
            tensors[item.hf] = drawn.topk(table.experts.shape[1]).indices
        elif item.hf not in tensors:
            tensors[item.hf] = torch.randn(item.stored_shape(False), generator=generator) * spread
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def stored(item: LoadItem) -> Iterator[LoadItem]:
    """The items that are read from files: where there are several ways, matrix by matrix, as they are published."""
    ways = [way for way in item.ways if all(part.hf for part in way)]
    if ways:
        yield from max(ways, key=len)
    else:
        yield item
