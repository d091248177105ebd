"""Orders in which checkpoints store the rows of a matrix, and how they become ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octavo.errors import UnsupportedModelError
from octavo.model.blocks import Part

if TYPE_CHECKING:
    from octavo.model.layers.load import Cut

QKV = 3  # what lies together in a head of a tensor stored "per_head", unless it says otherwise


def gate_then_up(rows: Tensor) -> Tensor:
    """[E, 2 I, ...] with gate and up rows taking turns -> all gates, then all ups."""
    return torch.cat((rows[:, ::2], rows[:, 1::2]), dim=1)


def untangle(rows: Tensor, heads: int, rotated: int = 0, start: int = 0) -> Tensor:
    """Rows of each head from interleaved pairs (0, d/2, 1, d/2 + 1, ...) back to halves: ``rotated`` of them (0 = all) from
    row ``start`` of the head on."""
    shape = rows.shape
    by_head = rows.reshape(heads, -1, *shape[1:])
    end = start + (rotated or by_head.shape[1] - start)
    turned = by_head[:, start:end].reshape(heads, -1, 2, *shape[1:]).transpose(1, 2)
    parts = (by_head[:, :start], turned.reshape(heads, end - start, *shape[1:]), by_head[:, end:])
    return torch.cat(parts, dim=1).reshape(shape)


def by_piece(rows: Tensor, heads: int, pieces: tuple[int, ...]) -> Tensor:
    """Rows ordered (head, piece, d) to (piece, head, d); pieces of these sizes, or three of the same."""
    shape = rows.shape
    by_head = rows.reshape(heads, -1, *shape[1:])
    split = torch.split(by_head, list(pieces) or by_head.shape[1] // QKV, dim=1)
    return torch.cat([piece.reshape(-1, *shape[1:]) for piece in split])


def stored_rows(part: Part, cut: Cut | None, gguf: bool) -> Tensor:
    """Which rows of the stored tensor are this rank's, in our order."""
    if not gguf and part.stored != "rows":
        raise UnsupportedModelError(
            f"{part.hf}: quantized matrices stored in {part.stored!r} order are not supported.",
            "Use the unquantized model.",
        )
    rows = torch.arange(part.out_features)
    if cut is not None and cut.dim == 0:
        rows = torch.arange(cut.start, cut.start + cut.size)
    heads = part.heads if gguf else part.hf_heads
    return untangle(rows, heads, part.rotated, part.turns_at) if heads else rows
