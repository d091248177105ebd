"""Compiled repacking equals the numpy functions byte for byte."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from test_numba_linear import LIBRARY, aligned, packed, random_rows

from octavo.device.kernels.numba import formats
from octavo.runner.cpu.packing import Packer
from octavo.runner.cpu.threads import Team


@pytest.fixture(scope="module")
def packer() -> Iterator[Packer]:
    team = Team(2, LIBRARY)
    yield Packer(team, LIBRARY)
    team.close()


@pytest.mark.parametrize("dtype", formats.BY_DTYPE)
def test_panels_are_those_of_the_reference(dtype: str, packer: Packer) -> None:
    size, rng = 512, np.random.default_rng(3)
    raw = random_rows(dtype, 80, size, rng)
    want = packed(dtype, raw, size)
    weights, scales = aligned(want[0].shape), aligned(want[1].shape)
    packer.pack(dtype, raw, size, weights, scales)
    assert np.array_equal(weights, want[0]) and np.array_equal(scales, want[1])


def test_planes_are_those_of_the_reference(packer: Packer) -> None:
    rng = np.random.default_rng(4)
    raw = random_rows("Q8_0", 48, 96, rng)
    whole, scales = packed("Q8_0", raw, 96)
    upper, lower = aligned((3, 3 * 384)), aligned((3, 3 * 128))
    formats.split_planes(whole, 3, upper, lower)
    got = aligned(upper.shape), aligned(scales.shape), aligned(lower.shape)
    packer.pack("Q8_0", raw, 96, *got)
    for array, want in zip(got, (upper, scales, lower)):
        assert np.array_equal(array, want)
