"""The inputs of a step of answers: the kernel against the reference, and what padding rows store."""

from __future__ import annotations

import pytest
import torch

from octavo.device.ops.step import DecodeInputs, decode_inputs

kernels = pytest.importorskip("octavo.device.kernels.triton.step")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("rows", "width", "page_size"), [(1, 3, 16), (7, 40, 4), (32, 1025, 16), (5, 2100, 3)]
)
def test_the_kernel_makes_what_the_reference_does(rows: int, width: int, page_size: int) -> None:
    generator = torch.Generator().manual_seed(rows)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator, dtype=torch.int32)

    num_slots = rows + 3
    table = draw(1 << 20, num_slots + 1, width).to(DEVICE)
    last_token = draw(1 << 17, num_slots + 1).long().to(DEVICE)
    slots = torch.randperm(num_slots, generator=generator)[:rows].to(torch.int32).to(DEVICE)
    starts = draw(width * page_size, rows).to(DEVICE)
    slots[-1], starts[-1] = num_slots, 0  # a padding row
    ours = DecodeInputs(*kernels.decode_inputs(slots, starts, last_token, table, page_size))
    theirs = decode_inputs(slots, starts, last_token, table, page_size)
    for name, mine, right in zip(DecodeInputs._fields, ours, theirs):
        assert mine.dtype == right.dtype, name
        assert torch.equal(mine, right), name
    assert ours.slot_mapping[-1].item() == -1
    assert (ours.slot_mapping[:-1] >= 0).all()
