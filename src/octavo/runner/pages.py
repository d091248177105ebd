"""Page memory on the device: the tensors beneath every cache group (see engine.cache.layout for the drawing)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from octavo.engine.cache.layout import CacheLayout
from octavo.engine.cache.spec import StateKV
from octavo.errors import UnsupportedModelError
from octavo.model.blocks import DecoderSpec
from octavo.protocol.plan import CopyPage, PageOp, ZeroPage


class PageMemory:
    """``layers_per_group`` tensors of [num_pages, page_bytes]; each layer sees its own as typed pages.

    Pages start as zeros: an attention kernel may read (and mask) the unwritten tail of a page, and garbage could
    hold NaN bit patterns that survive a multiplication by zero.
    """

    def __init__(
        self, layout: CacheLayout, num_pages: int, spec: DecoderSpec, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.tensors = [_zeros(num_pages, layout.page_bytes, device) for _ in range(layout.layers_per_group)]
        self.views: dict[int, Tensor] = {}
        self.groups: dict[int, int] = {}
        for index, group in enumerate(layout.groups):
            if isinstance(group.spec, StateKV):
                raise UnsupportedModelError("Recurrent state pages are not supported on this path yet.")
            for position, layer in enumerate(group.layers):
                attention = spec.layers[layer].attention
                shape = (num_pages, 2, attention.num_kv_heads, group.spec.page_size, attention.head_dim)
                self.views[layer] = _typed(self.tensors[position], shape, dtype)
                self.groups[layer] = index

    def apply(self, ops: list[PageOp]) -> None:
        """Carry out page operations, in order."""
        for op in ops:
            for tensor in self.tensors:
                if isinstance(op, CopyPage):
                    tensor[op.target] = tensor[op.source]
                elif isinstance(op, ZeroPage):
                    tensor[op.page].zero_()


def _zeros(num_pages: int, page_bytes: int, device: torch.device) -> Tensor:
    """Cleared bytes; on a CPU through calloc, so that pages nobody touches cost no memory and no time."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros((num_pages, page_bytes), np.uint8))
    return torch.zeros((num_pages, page_bytes), dtype=torch.uint8, device=device)


def _typed(raw: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A view of the pages as ``dtype`` [pages, 2, Hkv, P, D]; a padded page leaves a gap between rows."""
    typed = raw.view(dtype)
    strides = [1]
    for size in reversed(shape[2:]):
        strides.insert(0, strides[0] * size)
    return typed.as_strided(shape, (typed.stride(0), *strides))
