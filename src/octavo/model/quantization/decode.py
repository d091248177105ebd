"""Stored tensors to torch, a run of rows at a time, so that no second full copy exists."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.errors import ModelFileError
from octavo.files.dtypes import GGUF_TYPES_BY_NAME
from octavo.model.quantization.gguf_blocks import dequantize_blocks

CHUNK_ELEMENTS = 1 << 20  # 4 MiB of float32: stays near the caches, costs nothing beside the tensor


def dequantize(
    raw: NDArray[np.uint8], dtype_name: str, shape: Sequence[int], out: torch.Tensor | None = None
) -> torch.Tensor:
    """The stored tensor ``raw`` (flat uint8 in a GGUF type, F32, F16 or BF16) as a tensor of ``shape``.

    The result is a new float32 CPU tensor, or ``out`` (contiguous, any floating dtype and device, same number of
    elements), filled. Raises ``ModelFileError`` where type, bytes and shape do not fit each other.
    """
    found = GGUF_TYPES_BY_NAME.get(dtype_name)
    if found is None:
        raise ModelFileError(f"{dtype_name} cannot be decoded.", f"Known: {', '.join(GGUF_TYPES_BY_NAME)}.")
    kind = found[1]
    elements = math.prod(shape)
    if elements * kind.nbytes != raw.size * kind.block:
        raise ModelFileError(f"{raw.size} bytes of {dtype_name} are not a tensor of shape {list(shape)}.")
    if out is None:
        out = torch.empty(tuple(shape), dtype=torch.float32)
    elif out.numel() != elements or not out.is_contiguous():
        raise ModelFileError(
            f"A tensor of shape {list(shape)} cannot be decoded into one of {list(out.shape)}."
        )
    flat = out.view(-1)
    for start in range(0, elements, CHUNK_ELEMENTS):  # a multiple of every block size
        stop = min(start + CHUNK_ELEMENTS, elements)
        piece = raw[start // kind.block * kind.nbytes : stop // kind.block * kind.nbytes]
        values = dequantize_blocks(piece, dtype_name)
        # Views of the file are read-only, which torch does not know; it warns, although we only read.
        flat[start:stop].copy_(torch.from_numpy(values if values.flags.writeable else values.copy()))
    return out
