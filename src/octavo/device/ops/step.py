"""What a step of answers needs on the device, made from the two numbers a row that the host sends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from octavo.device.ops.bind import Op, triton_rows


class DecodeInputs(NamedTuple):
    """Of R rows with one token each; ``page_table`` and ``slot_mapping`` are those of one cache group.

    token_ids, positions, ends [R] int64 (``ends``: positions + 1), kv_lens [R] int32, slots [R] int64; page_table [R, W]
    int32; slot_mapping [R] int64, -1 = store nothing.
    """

    token_ids: Tensor
    positions: Tensor
    ends: Tensor
    kv_lens: Tensor
    slots: Tensor
    page_table: Tensor
    slot_mapping: Tensor


def decode_inputs(
    slots: Tensor, starts: Tensor, last_token: Tensor, table: Tensor, page_size: int
) -> DecodeInputs:
    """Row r computes the token drawn last in slot ``slots[r]``, at position ``starts[r]``.

    slots, starts [R] int32; last_token [N] int64; table [N, W] int32, page numbers. The last of the N slots is that of
    padding rows, which store nothing.
    """
    positions = starts.long()
    rows = table.index_select(0, slots)
    page = rows.gather(1, (positions // page_size).unsqueeze(1)).squeeze(1).long()
    places = page * page_size + positions % page_size
    real = slots != last_token.shape[0] - 1
    return DecodeInputs(
        last_token[slots],
        positions,
        positions + 1,
        starts + 1,
        slots.long(),
        rows,
        torch.where(real, places, -1),
    )


DECODE_INPUTS = Op("decode_inputs", decode_inputs, triton_rows("step:decode_inputs"))
