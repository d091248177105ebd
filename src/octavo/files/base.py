"""The seam between model files on disk and everything that reads them (config, tokenizer, weights)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor.

    ``shape`` is row-major, outermost first ([out, in] for a matrix, whatever the file's own order). ``dtype`` is
    one of F32 F16 BF16 F8_E4M3 ... I32 (safetensors' names) or a GGUF block type (Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K
    Q5_K Q6_K). ``nbytes`` counts the bytes in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class ModelFiles(Protocol):
    """A model on disk, opened and checked; the same face for a Hugging Face folder and a GGUF file.

    ``format`` is "safetensors", "gguf" or "dummy". ``config`` is config.json's content, or the GGUF metadata
    (keys as in the file, like "llama.block_count"; arrays as lists). ``chat_template`` is the template text or None,
    ``generation_config`` the content of generation_config.json ({} where absent).
    """

    name: str
    path: Path
    format: str
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    chat_template: str | None
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str) -> NDArray[np.uint8]:
        """The tensor's raw bytes: a flat uint8 view of the mapped file (copies nothing)."""

    def close(self) -> None:
        """Unmap the files."""
