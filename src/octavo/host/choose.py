"""Which backend runs a model: torch (GPUs, and any model on a CPU) or the compiled CPU program."""

from __future__ import annotations

from importlib import import_module

from octavo.config import ON_LOAD, ON_LOAD_CPU, EngineOptions
from octavo.device.platform.machine import gpu_in_sight
from octavo.errors import UsageError
from octavo.files.base import ModelFiles
from octavo.model.arch import ArchConfig
from octavo.model.classes import has_classes
from octavo.model.describe import describe, is_encoder

PLAIN = {"F32", "F16", "BF16"}


def choose_backend(options: EngineOptions, files: ModelFiles, arch: ArchConfig) -> str:
    """ "compiled" where the device is a CPU, the user did not ask for torch, and the kernels cover the model."""
    if is_encoder(arch):
        return "encoder"
    if options.model.quantization in ON_LOAD_CPU:
        return require_compiled(options, files, arch)
    device = options.device
    if arch.implementation != "octavo":  # transformers' modules
        return "torch"
    if options.parallel.ranks > 1:  # the compiled program knows one process
        return "torch"
    if device.device == "cuda" or (device.device == "auto" and gpu_in_sight()):
        return "torch"
    if device.cpu_backend == "torch" or options.model.dtype not in ("auto",):
        return "torch"
    if options.model.runner == "pooling" or has_classes(
        arch
    ):  # the compiled kernels give tokens, not hidden states
        return "torch"
    # None of these types is one of the compiled kernels'.
    if options.model.quantization in ON_LOAD or options.cache.kv_cache_dtype != "auto":
        return "torch"
    return "torch" if unsupported(arch, files) else "compiled"


def require_compiled(options: EngineOptions, files: ModelFiles, arch: ArchConfig) -> str:
    """The compiled backend, which alone knows these formats; a ``UsageError`` with the reason where it cannot run."""
    asked, reason = f"--quantization {options.model.quantization}", None
    if options.device.device == "cuda" or (options.device.device == "auto" and gpu_in_sight()):
        reason = "the model runs on a GPU here"
    elif options.device.cpu_backend == "torch" or options.model.dtype != "auto":
        reason = "--cpu-backend torch and --dtype ask for another"
    elif arch.implementation != "octavo" or options.parallel.ranks > 1:
        reason = "transformers' modules and several ranks run on the torch path"
    else:
        reason = unsupported(arch, files)
    if reason:
        raise UsageError(
            f"{asked} is a format of the compiled CPU path alone: {reason.rstrip('.')}.",
            "Leave it out, or use --quantization fp8 on a GPU.",
        )
    matrices = {info.dtype for info in files.tensors.values() if len(info.shape) == 2}
    if not matrices & PLAIN:
        raise UsageError(
            f"{asked} has nothing to do: {files.name} is quantized already ({', '.join(sorted(matrices))}).",
            "Leave it out.",
        )
    return "compiled"


def unsupported(arch: ArchConfig, files: ModelFiles) -> str | None:
    """Why the compiled kernels do not cover a model; None where they do. Only now are they imported."""
    reason: str | None = import_module("octavo.runner.cpu.support").supports(describe(arch), files)
    return reason
