"""Triton's interpreter runs the kernels where there is no GPU; it must be chosen before triton is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_runtest_setup() -> None:
    """An engine takes all cores, for the rest of its process: tests after it would wait for those of other processes."""
    torch.set_num_threads(1)
