"""New sequences reach the device without a wait: every upload of an admission is one copy from page-locked memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from octavo.device.platform.cpu import CPUPlatform
from octavo.engine.cache.layout import plan_layout
from octavo.engine.cache.spec import FullKV
from octavo.protocol.generate import SamplingParams
from octavo.protocol.plan import SlotInit
from octavo.runner.sampling.penalties import IN_PROMPT, TokenCounts
from octavo.runner.slots import Slots
from octavo.runner.staging import Staging

LAYOUT = plan_layout({0: FullKV(16, 64)})


def init(slot: int, tokens: list[int], num_prompt: int, seed: int = 0, **sampling: Any) -> SlotInit:
    return SlotInit(slot, tokens, num_prompt, SamplingParams(**sampling), seed, [])


def test_parameters_arrive_to_the_bit() -> None:
    slots = Slots(8, 128, LAYOUT, CPUPlatform())
    seeds = [2**62 + 12345, -1, 0, 2**31]
    temperatures = [0.1, 1.0 / 3.0, 1e-3, 2.0]
    slots.admit(
        [
            init(slot, [1, 2], 2, seed, temperature=heat, top_p=0.9, top_k=40 + slot, frequency_penalty=-0.3)
            for slot, seed, heat in zip((5, 0, 7, 2), seeds, temperatures)
        ]
    )
    for slot, seed, heat in zip((5, 0, 7, 2), seeds, temperatures):
        assert slots.ints[slot].tolist() == [40 + slot, seed]
        expected = np.asarray([heat, 0.9, 0.0, 0.0, -0.3, 1.0], np.float32)
        assert np.array_equal(slots.floats[slot].numpy(), expected)
    assert slots.ints[1].tolist() == [0, 0]


def test_penalty_rows_hold_prompt_and_answer() -> None:
    counts = TokenCounts(8, 50, CPUPlatform())
    asked = {"presence_penalty": 0.5}
    counts.admit(
        [
            init(3, [7, 7, 9, 4, 4, 4, 7], 3, **asked),
            init(1, [2], 1),
            init(6, [0, 49], 2, **asked),
        ]
    )
    first, second = (counts.table[counts.row_of[slot]] for slot in (3, 6))
    assert {i: int(n) for i, n in enumerate(first) if n} == {7: IN_PROMPT + 1, 9: IN_PROMPT, 4: 3}
    assert {i: int(n) for i, n in enumerate(second) if n} == {0: IN_PROMPT, 49: IN_PROMPT}
    assert counts.row_of[1] == -1
    counts.admit([init(3, [5], 1, **asked)])
    again = counts.table[counts.row_of[3]]
    assert {i: int(n) for i, n in enumerate(again) if n} == {5: IN_PROMPT}, "the row was cleared"


@pytest.mark.parametrize("owner", ["slots", "counts"])
def test_an_admission_of_many_is_one_upload(owner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring of buffers outlives two steps, not more uploads in one."""
    uploads = 0
    upload = Staging.upload

    def counting(self: Staging, columns: Any) -> list[torch.Tensor]:
        nonlocal uploads
        uploads += 1
        return upload(self, columns)

    monkeypatch.setattr(Staging, "upload", counting)
    many = [init(slot, [slot, 1], 2, repetition_penalty=1.2) for slot in range(8)]
    made = Slots(8, 128, LAYOUT, CPUPlatform()) if owner == "slots" else TokenCounts(8, 50, CPUPlatform())
    made.admit(many)
    assert uploads == 1
