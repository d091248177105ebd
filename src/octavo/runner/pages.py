"""Page memory on the device: the tensors beneath every cache group (see engine.cache.layout for the drawing)."""

from __future__ import annotations

from dataclasses import replace

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
        self.places = self._places()

    def _places(self) -> dict[int, CachePlace]:
        """Every layer's places, the first of them holding the others."""
        found: dict[int, dict[int, CachePlace]] = {}
        for index, group in enumerate(self.layout.groups):
            for position, (layer, part) in enumerate(group.members()):
                found.setdefault(layer, {})[part] = CachePlace(self.tensors[position], index, group.spec)
        ordered = {layer: [parts[part] for part in sorted(parts)] for layer, parts in found.items()}
        return {layer: replace(first, more=tuple(more)) for layer, (first, *more) in ordered.items()}

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
