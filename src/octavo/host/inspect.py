"""What a model is made of and how it would run here, from its configuration and its tensors' headers; loads nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from octavo.api.chat.selftest import Finding
from octavo.config import EngineOptions, resolve
from octavo.device.ops.bind import Binder
from octavo.device.platform.base import Platform
from octavo.device.platform.select import open_platform
from octavo.engine.cache.layout import plan_layout
from octavo.engine.cache.spec import CompressedKV, StateKV, kinds_of, label
from octavo.errors import OctavoError
from octavo.files.base import ModelFiles
from octavo.host.built import limits_of
from octavo.host.choose import choose_backend
from octavo.host.torch_engine import DTYPES
from octavo.model.arch import ArchConfig
from octavo.model.blocks import DecoderSpec, Layer, MoE
from octavo.model.describe import cache_specs, describe
from octavo.model.face import AnyNetwork
from octavo.model.fallback.network import TransformersNetwork
from octavo.model.footprint import num_parameters
from octavo.model.load import match, renaming
from octavo.model.network import Network
from octavo.model.quantization.choose import choose_format
from octavo.runner.cpu.runner import BYTES_PER_ELEMENT
from octavo.runner.cpu.support import kernels_for, supports


def inspect_model(options: EngineOptions, files: ModelFiles, arch: ArchConfig) -> Iterator[Finding]:
    """Layers, cache, kernels and tensors, in this order."""
    spec = describe(arch)
    count = arch.num_parameters or num_parameters(spec)
    yield Finding(
        "architecture", f"{arch.label}, {count / 1e9:.3g} billion parameters, {arch.max_position} positions"
    )
    yield Finding("layers", layer_pattern(spec))
    platform = open_platform(options.device.device, threads=options.device.threads)
    resolved = resolve(options, platform.hardware(), limits_of(arch))
    dtype = DTYPES[resolved.dtype]
    backend = choose_backend(options, files, arch)
    yield from cache_groups(
        spec, resolved.page_size, BYTES_PER_ELEMENT if backend == "compiled" else dtype.itemsize
    )
    if backend == "compiled":
        yield Finding("kernels", f"compiled for this processor: {', '.join(kernels_for(spec, files))}")
    elif platform.kind == "cpu" and arch.implementation == "octavo":
        yield Finding("kernels", f"torch reference ({supports(spec, files) or 'as asked'})", "note")
    binder = Binder()
    try:
        network = bare_network(options, files, arch, spec, platform, binder, dtype)
    except OctavoError as error:
        yield Finding("kernels", error.cause, "wrong")
        return
    if backend == "torch":
        bound = "; ".join(f"{op}: {names}" for op, names in binder.explain().items())
        yield Finding("kernels", f"{platform.hardware().name}: {bound}")
    yield check_tensors(network, files)


def layer_pattern(spec: DecoderSpec) -> str:
    """Layers in a row that are alike, counted; where the whole repeats itself, its period."""
    kinds = [layer_kind(layer) for layer in spec.layers]
    for period in range(1, len(kinds) // 2 + 1):
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
            times, rest = divmod(len(kinds), period)
            tail = f", then {runs(kinds[:rest])}" if rest else ""
            whole = runs(kinds[:period])
            return f"{len(kinds)} x {kinds[0]}" if period == 1 else f"{times} x ({whole}){tail}"
    return runs(kinds)


def runs(kinds: list[str]) -> str:
    """Neighbours that are equal, counted."""
    return ", ".join(f"{len(list(group))} x {kind}" for kind, group in itertools.groupby(kinds))


def layer_kind(layer: Layer) -> str:
    """A layer in a few words."""
    first, *more = kinds_of(layer.attention.cache(1, 1))
    size = getattr(first, "window", 0) or getattr(first, "chunk", 0)
    mixer = f"{type(layer.attention).__name__}{f' window {size}' if size else ''}"
    entries = [label(kind) for kind in more if isinstance(kind, CompressedKV)]
    if entries:
        mixer += f", {entries[0]}{' and chosen' if len(entries) > 1 else ''}"
    if isinstance(layer.mlp, MoE):
        shared = " + shared" if layer.mlp.shared is not None else ""
        return f"{mixer} + {layer.mlp.experts.num} experts, {layer.mlp.router.top_k} at a time{shared}"
    return f"{mixer} + {type(layer.mlp).__name__}"


def cache_groups(
    spec: DecoderSpec, page_size: int, element_bytes: int, kv_bytes: int | None = None
) -> Iterator[Finding]:
    """Each group's kind, layers and bytes."""
    layout = plan_layout(cache_specs(spec, page_size, element_bytes, kv_bytes))
    for index, group in enumerate(layout.groups):
        kind = group.spec
        layers = f"{len(group.layers)} layers ({spans(group.layers)})"
        if isinstance(kind, StateKV):
            amount = f"{kind.state_bytes * len(group.layers)} bytes of state a checkpoint of {kind.page_size} tokens"
        else:
            amount = f"{kind.token_bytes * len(group.layers)} bytes a token, pages of {kind.page_size} tokens"
        yield Finding(f"cache group {index}", f"{label(kind)}: {layers}; {amount}")


def spans(numbers: Sequence[int]) -> str:
    """Sorted numbers, neighbours joined: 0-4, 6."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][-1] == number - 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in found)


def bare_network(
    options: EngineOptions,
    files: ModelFiles,
    arch: ArchConfig,
    spec: DecoderSpec,
    platform: Platform,
    binder: Binder,
    dtype: torch.dtype,
) -> AnyNetwork:
    """The network with its kernels bound and no memory behind its parameters."""
    op_spec, nowhere = platform.op_spec(dtype), torch.device("meta")
    if arch.implementation != "octavo":
        return TransformersNetwork(arch, files, dtype=dtype, device=nowhere, binder=binder, op_spec=op_spec)
    return Network(
        spec,
        dtype=dtype,
        device=nowhere,
        binder=binder,
        op_spec=op_spec,
        max_position=1,
        weight_format=choose_format(options.model.quantization, spec, op_spec, files, renaming(files, spec)),
    )


def check_tensors(network: AnyNetwork, files: ModelFiles) -> Finding:
    """Whether every tensor is there, has its shape, and is used."""
    if files.format == "dummy":
        return Finding("tensors", "none here, only the configuration", "note")
    try:
        found, ignored = match(network.items(), network.named(files), network.spec)
    except OctavoError as error:
        return Finding("tensors", error.cause, "wrong")
    used = len({name for names, _ in found for name in names})
    return Finding(
        "tensors", f"{used} of {len(files.tensors)} are used, {len(ignored)} known to be of no use"
    )
