"""The inputs of a step of answers in one launch instead of fifteen: on a small model they took as long as a layer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # page numbers a program copies
# Columns of one tensor, whose alignment follows the number of rows, and windows of another: one kernel for all.
COLUMNS = [
    "token_ids",
    "positions",
    "ends",
    "own_slots",
    "slot_mapping",
    "slots",
    "starts",
    "table",
    "page_table",
]


@triton.jit(do_not_specialize=["padding", "width"], do_not_specialize_on_alignment=COLUMNS)
def _decode_inputs_kernel(
    token_ids, positions, ends, kv_lens, own_slots, page_table, slot_mapping, slots, starts, last_token, table,
    padding, width, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK page numbers of one row; the first program of a row writes what there is one of."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, start = tl.load(slots + row).to(tl.int64), tl.load(starts + row)
    source = table + slot * width
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    tl.store(page_table + row * width + at, tl.load(source + at, mask=inside, other=0), mask=inside)
    if block == 0:
        place = tl.load(source + start // PAGE).to(tl.int64) * PAGE + start % PAGE
        tl.store(slot_mapping + row, tl.where(slot == padding, -1, place))
        tl.store(token_ids + row, tl.load(last_token + slot))
        tl.store(positions + row, start.to(tl.int64))
        tl.store(ends + row, start.to(tl.int64) + 1)
        tl.store(kv_lens + row, start + 1)
        tl.store(own_slots + row, slot)


def decode_inputs(
    slots: Tensor, starts: Tensor, last_token: Tensor, table: Tensor, page_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``octavo.device.ops.step.decode_inputs`` on a GPU; everything is contiguous. The fields of ``DecodeInputs``."""
    rows, width = slots.shape[0], table.shape[1]
    longs = torch.empty((5, rows), dtype=torch.int64, device=slots.device)
    token_ids, positions, ends, own_slots, slot_mapping = longs.unbind(0)
    kv_lens = torch.empty_like(starts)
    page_table = torch.empty((rows, width), dtype=torch.int32, device=slots.device)
    _decode_inputs_kernel[(rows, triton.cdiv(width, BLOCK))](
        token_ids, positions, ends, kv_lens, own_slots, page_table, slot_mapping, slots, starts, last_token, table,
        last_token.shape[0] - 1, width, PAGE=page_size, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return token_ids, positions, ends, kv_lens, own_slots, page_table, slot_mapping
