"""The encoder backend: load the network on a platform; there is no cache to size and nothing to capture."""

from __future__ import annotations

from dataclasses import replace

from octavo.config import EngineOptions, resolve
from octavo.device.ops.bind import Binder
from octavo.device.platform.select import open_platform
from octavo.errors import UsageError
from octavo.files.base import ModelFiles
from octavo.files.pooler import read_pooler
from octavo.host.built import Built, Progress, Timeline, limits_of
from octavo.host.torch_engine import DTYPES
from octavo.model.arch import ArchConfig
from octavo.model.describe import describe_encoder
from octavo.model.encoder_network import EncoderNetwork
from octavo.runner.encoder import EncoderRunner
from octavo.runner.memory import MemoryPlan


def build(
    options: EngineOptions, files: ModelFiles, arch: ArchConfig, timeline: Timeline, progress: Progress
) -> Built:
    """Load the network; a text has at most as many tokens as the model has positions."""
    if options.model.quantization is not None:
        raise UsageError(f"--quantization {options.model.quantization} is not served for encoders.")
    platform = open_platform(options.device.device, threads=options.device.threads)
    hardware = platform.hardware()
    spec = describe_encoder(arch)
    longest = min(spec.max_length, read_pooler(files.path).max_length or spec.max_length)
    resolved = resolve(options, hardware, limits_of(replace(arch, max_position=longest)))
    dtype = DTYPES[resolved.dtype]
    binder = Binder()
    timeline.end("imports")
    network = EncoderNetwork(
        spec, dtype=dtype, device=platform.device, binder=binder, op_spec=platform.op_spec(dtype)
    )
    network.load(files, progress=lambda done, total: progress("loading weights", done, total))
    platform.synchronize()
    timeline.end("weights")
    runner = EncoderRunner(
        network,
        platform,
        num_slots=resolved.max_num_seqs,
        max_tokens=max(resolved.max_num_batched_tokens, resolved.max_model_len),
    )
    free = platform.free_bytes()
    memory = MemoryPlan(0, resolved.max_model_len, 0, free, 0, 0)
    return Built(runner, arch, resolved, memory, hardware.name, binder.explain(), kind=platform.kind)
