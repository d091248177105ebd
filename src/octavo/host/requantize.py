"""A GGUF file with its matrices stored in another block type, for comparisons on equal weights."""

from __future__ import annotations

from pathlib import Path

from octavo.errors import UsageError
from octavo.files.base import ModelFiles
from octavo.files.dtypes import GGUF_TYPES_BY_NAME
from octavo.files.gguf_write import StoredTensor, write_gguf
from octavo.model.quantization.gguf_blocks import dequantize_blocks, quantize_blocks

TYPES = ("Q4_0", "Q4_1", "Q8_0")
FINER = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
)  # kept: embeddings, norms, and what the file's makers held to be sensitive


def requantize(files: ModelFiles, dtype: str, folder: Path) -> Path:
    """Write ``files`` to ``folder`` with every coarse matrix as ``dtype``; returns the new file's path."""
    if files.format != "gguf":
        raise UsageError(f"{files.name} is no GGUF file.", "Name one to requantize it.")
    if dtype not in TYPES:
        raise UsageError(f"Unknown block type {dtype}.", f"Use one of {', '.join(TYPES)}.")
    block = GGUF_TYPES_BY_NAME[dtype][1].block
    tensors = {}
    for name, info in files.tensors.items():
        raw, kind = files.read(name), info.dtype
        if len(info.shape) == 2 and kind not in FINER and info.shape[1] % block == 0:
            raw, kind = quantize_blocks(dequantize_blocks(raw, kind), dtype), dtype
        tensors[name] = StoredTensor(kind, info.shape, raw)
    path = folder / f"{files.path.stem}.{dtype}.gguf"
    write_gguf(path, files.config, tensors)
    return path
