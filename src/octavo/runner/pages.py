"""Page memory on the device: the tensors beneath every cache group (see engine.cache.layout for the drawing)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from octavo.engine.cache.layout import CacheLayout
from octavo.model.cache import CachePlace
from octavo.protocol.plan import CopyPage, PageOp, ZeroPage


class PageMemory:
    """``layers_per_group`` tensors of [num_pages, page_bytes]; each layer makes typed pages of its own (``places``).

    Pages start as zeros: an attention kernel may read (and mask) the unwritten tail of a page, and garbage could
    hold NaN bit patterns that survive a multiplication by zero.
    """

    def __init__(self, layout: CacheLayout, num_pages: int, device: torch.device) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.tensors = [_zeros(num_pages, layout.page_bytes, device) for _ in range(layout.layers_per_group)]
        self.places: dict[int, CachePlace] = {
            layer: CachePlace(self.tensors[position], index, group.spec)
            for index, group in enumerate(layout.groups)
            for position, layer in enumerate(group.layers)
        }

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
