"""Which backend runs a model: torch (GPUs, and any model on a CPU) or the compiled CPU program."""

from __future__ import annotations

import os
from pathlib import Path

from octavo.config import ON_LOAD, EngineOptions
from octavo.files.base import ModelFiles
from octavo.model.arch import ArchConfig
from octavo.model.describe import describe
from octavo.runner.cpu.support import supports

NVIDIA_SIGNS = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg")


def choose_backend(options: EngineOptions, files: ModelFiles, arch: ArchConfig) -> str:
    """ "compiled" where the device is a CPU, the user did not ask for torch, and the kernels cover the model."""
    device = options.device
    if arch.implementation != "octavo":  # transformers' modules
        return "torch"
    if options.parallel.ranks > 1:  # the compiled program knows one process
        return "torch"
    if device.device == "cuda" or (device.device == "auto" and gpu_in_sight()):
        return "torch"
    if device.cpu_backend == "torch" or options.model.dtype not in ("auto",):
        return "torch"
    # None of these types is one of the compiled kernels'.
    if options.model.quantization in ON_LOAD or options.cache.kv_cache_dtype != "auto":
        return "torch"
    return "torch" if supports(describe(arch), files) else "compiled"


def gpu_in_sight() -> bool:
    """Whether a CUDA device may be there; asked before torch is imported, so it only looks at files."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return False
    return any(Path(sign).exists() for sign in NVIDIA_SIGNS) or os.name == "nt"
