"""Fills parameters from model files: streamed tensor by tensor, strict about what is missing or left over."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.errors import ModelFileError
from octavo.files.base import ModelFiles
from octavo.files.dtypes import GGUF_TYPES_BY_NAME
from octavo.model.blocks import DecoderSpec, Part
from octavo.model.encoder import EncoderSpec
from octavo.model.layers.load import LoadItem, StoredMatrix
from octavo.model.layers.order import by_piece, gate_then_up, untangle
from octavo.model.quantization.decode import dequantize
from octavo.model.quantization.mxfp4 import BLOCK, decode_mxfp4

TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZED_TYPES = {  # of the tensors that quantized checkpoints hold beside those
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,  # exponents: scales that are powers of two
}
AS_STORED = Part("", "", 0)
SHOWN = 8  # names listed in an error


@dataclass(frozen=True)
class LoadReport:
    """What was read: tensors, bytes in the files, and names that were known to be of no use."""

    num_tensors: int
    num_bytes: int
    ignored: tuple[str, ...]


def fill(
    items: list[LoadItem],
    files: ModelFiles,
    spec: DecoderSpec | EncoderSpec,
    progress: Callable[[int, int], None] | None = None,
) -> LoadReport:
    """Fill every item from ``files``; see ``Network.load``."""
    gguf, rename = files.format == "gguf", renaming(files, spec)
    found, ignored = match(items, files, spec)
    total = sum(files.tensors[name].nbytes for name in {name for names, _ in found for name in names})
    done = 0
    seen: set[str] = set()
    for names, item in found:
        if isinstance(item, StoredMatrix):
            take_matrix(item, files, gguf, rename)
        elif item.scales:
            read_mxfp4(item, files, *names)
        else:
            read_into(item, files, names[0], gguf)
        done += sum(
            files.tensors[name].nbytes for name in set(names) - seen
        )  # several items may share a tensor
        seen.update(names)
        if progress:
            progress(done, total)
    return LoadReport(len(found), total, ignored)


def match(
    items: list[LoadItem], files: ModelFiles, spec: DecoderSpec | EncoderSpec
) -> tuple[list[tuple[tuple[str, ...], LoadItem]], tuple[str, ...]]:
    """(stored names, item) of all that must be read, and the names that are known to be of no use.

    Raises ``ModelFileError`` for what is missing, left over, or of another shape; reads headers only.
    """
    gguf, rename = files.format == "gguf", renaming(files, spec)
    items = found_in(items, set(files.tensors), gguf, rename)
    names = [wanted_names(item, files, gguf, rename) for item in items]
    ignored = check_names([name for group in names for name in group], files, spec, rename)
    for group, item in zip(names, items):
        if not isinstance(item, StoredMatrix):
            check_shape(item, files, group[0], gguf)
    return list(zip(names, items)), ignored


def renaming(files: ModelFiles, spec: DecoderSpec | EncoderSpec) -> Callable[[str], str]:
    """From a block's name of a tensor to the file's."""
    if files.format == "gguf":
        return lambda name: name
    return hf_renaming(files, spec.bare_prefix, spec.bare_names if isinstance(spec, DecoderSpec) else ())


def wanted_names(
    item: LoadItem, files: ModelFiles, gguf: bool, rename: Callable[[str], str]
) -> tuple[str, ...]:
    """The stored tensors that an item needs, the main one first."""
    if isinstance(item, StoredMatrix):
        found = [(source, source.name if gguf else rename(source.name)) for source in item.sources]
        return tuple(name for source, name in found if source.required or name in files.tensors)
    name = item.gguf if gguf else rename(item.hf)
    return (name, rename(item.scales)) if item.scales else (name,)


def check_shape(item: LoadItem, files: ModelFiles, name: str, gguf: bool) -> None:
    """Raise ``ModelFileError`` where the stored tensor is not what the configuration says."""
    info, wanted = files.tensors[name], item.stored_shape(gguf)
    if info.shape != wanted:
        raise ModelFileError(
            f"Tensor {name} has shape {list(info.shape)}, but the configuration asks {list(wanted)}.",
            "The configuration and the weights do not belong together.",
        )


def take_matrix(item: StoredMatrix, files: ModelFiles, gguf: bool, rename: Callable[[str], str]) -> None:
    """Give a quantized matrix its stored tensors; GGUF blocks as bytes [rows, bytes of a row]."""
    stored: dict[str, Tensor] = {}
    for source in item.sources:
        name = source.name if gguf else rename(source.name)
        info = files.tensors.get(name)
        if info is None:
            continue
        raw = torch.from_numpy(files.read(name))
        kind = TORCH_TYPES.get(info.dtype) or QUANTIZED_TYPES.get(info.dtype)
        if kind is not None:
            stored[source.key] = raw.view(kind).view(info.shape)
        elif gguf and info.dtype in GGUF_TYPES_BY_NAME:
            stored[source.key] = raw.view(math.prod(info.shape[:-1]), -1)
        else:
            raise ModelFileError(f"Tensor {name} is stored as {info.dtype}, which cannot be loaded.")
    item.take(stored)


def found_in(
    items: list[LoadItem], present: set[str], gguf: bool, rename: Callable[[str], str]
) -> list[LoadItem]:
    """The items as this file holds them (see ``LoadItem.ways``); where it holds none of the ways, the one it comes
    nearest to, so that what is missing can be named."""
    chosen: list[LoadItem] = []
    for item in items:
        ways = []
        for way in item.ways:
            names = [part.gguf if gguf else rename(part.hf) if part.hf else "" for part in way]
            if all(names):
                ways.append((sum(name in present for name in names) / len(names), way))
        chosen += max(ways, key=lambda found: found[0])[1] if ways else (item,)
    return chosen


def hf_renaming(
    files: ModelFiles, bare_prefix: str = "", bare_names: tuple[tuple[str, str], ...] = ()
) -> Callable[[str], str]:
    """How this checkpoint spells a decoder's names: multimodal ones put their language model into a part of its own.

    Old spelling: language_model.model.layers.0..., language_model.lm_head; new: model.language_model.layers.0..., lm_head.
    ``bare_prefix`` is left out by checkpoints of the decoder without its head, whose names may then begin otherwise
    (``bare_names``).
    """
    if bare_prefix and not any(name.startswith(bare_prefix) for name in files.tensors):

        def bare(name: str) -> str:
            name = name.removeprefix(bare_prefix)
            for ours, theirs in bare_names:
                if name.startswith(ours):
                    return theirs + name.removeprefix(ours)
            return name

        return bare
    if any(name.startswith("language_model.model.") for name in files.tensors):
        return lambda name: f"language_model.{name}"
    if any(name.startswith("model.language_model.") for name in files.tensors):
        return lambda name: re.sub(r"^model\.", "model.language_model.", name)
    return lambda name: name


def check_names(
    names: list[str], files: ModelFiles, spec: DecoderSpec | EncoderSpec, rename: Callable[[str], str]
) -> tuple[str, ...]:
    """Raise ``ModelFileError`` for missing or unknown tensors; returns those that are known to be of no use."""
    missing = [name for name in names if name not in files.tensors]
    unused = sorted(set(files.tensors) - set(names))
    useless = []
    language_model = rename("model.")
    for name in list(unused):
        tied = spec.head is None and name == rename("lm_head.weight")
        # Beside a language model of its own stand vision towers and projectors, which text does not need.
        other_tower = language_model != "model." and not name.startswith(language_model)
        if tied or other_tower or useless_name(name, spec, rename):
            unused.remove(name)
            useless.append(name)
    if missing or unused:
        parts = []
        for what, found in (("missing", missing), ("not used by this architecture", unused)):
            if found:
                more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
                parts.append(f"{len(found)} tensors are {what}: {', '.join(found[:SHOWN])}{more}")
        raise ModelFileError(
            f"The weights of {files.name} do not fit its configuration: {'; '.join(parts)}.",
            "Check that all files belong to one model and were downloaded completely.",
        )
    return tuple(useless)


def useless_name(name: str, spec: DecoderSpec | EncoderSpec, rename: Callable[[str], str]) -> bool:
    """Whether the family says that a tensor is of no use."""
    return name.endswith(spec.ignored) or name.startswith(tuple(map(rename, spec.ignored_prefixes)))


def read_into(item: LoadItem, files: ModelFiles, name: str, gguf: bool) -> None:
    """Decode one stored tensor into its target."""
    info = files.tensors[name]
    raw = files.read(name)
    part = item.part if item.part is not None else AS_STORED
    heads = part.heads if gguf else part.hf_heads
    order = "rows" if gguf else part.stored
    if info.dtype not in TORCH_TYPES and info.dtype not in GGUF_TYPES_BY_NAME:
        raise ModelFileError(
            f"Tensor {name} is stored as {info.dtype}, which cannot be loaded.",
            "Use the unquantized model or a GGUF file.",
        )
    if info.dtype in TORCH_TYPES:
        stored = torch.from_numpy(raw).view(TORCH_TYPES[info.dtype]).view(info.shape)
    elif not heads and order == "rows" and item.cut is None and item.target.is_contiguous():
        if item.store is not None:
            requantize(item, raw, info.dtype)
        else:
            dequantize(raw, info.dtype, info.shape, out=item.target)
        return
    else:
        stored = dequantize(raw, info.dtype, info.shape)
    if order in ("transposed", "alternating_columns") and stored.dim() > 1:
        stored = stored.transpose(-1, -2)
    if order == "per_head":
        stored = by_piece(stored, part.stored_heads, part.stored_pieces)
    elif order in ("alternating", "alternating_columns"):
        stored = gate_then_up(stored)
    if item.cut is not None:
        stored = stored.narrow(item.cut.dim, item.cut.start, item.cut.size)
    if heads:
        stored = untangle(stored, heads, part.rotated, part.turns_at)
    if item.offset and not gguf:
        stored = stored.to(torch.float32) + item.offset
    item.fill(stored)


def requantize(item: LoadItem, raw: NDArray[np.uint8], dtype_name: str) -> None:
    """Decode a matrix of GGUF blocks into a quantized target, some rows at a time."""
    count, size = item.target.shape[-2:]
    row_bytes = raw.size // (item.target.numel() // size)
    for index, rows in item.blocks():
        shape = (rows.stop - rows.start, size)
        first = index * count + rows.start
        piece = raw[first * row_bytes : (first + shape[0]) * row_bytes]
        item.fill_rows(index, rows, dequantize(piece, dtype_name, shape))


def read_mxfp4(item: LoadItem, files: ModelFiles, name: str, scales_name: str) -> None:
    """Decode stacked matrices [E, rows, inputs] stored as MXFP4 blocks, whole or this rank's part."""
    shape, scales_info = files.tensors[name].shape, files.tensors[scales_name]
    if files.tensors[name].dtype != "U8" or scales_info.dtype != "U8" or scales_info.shape != shape[:-1]:
        raise ModelFileError(f"Tensors {name} and {scales_name} are not MXFP4 blocks and their scales.")
    blocks = torch.from_numpy(files.read(name)).view(shape)
    scales = torch.from_numpy(files.read(scales_name)).view(shape[:-1])
    if item.part is not None and item.part.stored == "alternating":
        blocks, scales = gate_then_up(blocks), gate_then_up(scales)
    if item.cut is not None:
        cut = item.cut
        unit = BLOCK if cut.dim == 2 else 1  # inputs lie in blocks
        if cut.start % unit or cut.size % unit:
            raise ModelFileError(
                f"Tensor {name}: {cut.size} inputs a device are no whole MXFP4 blocks of {BLOCK}.",
                "Choose another tensor parallel size.",
            )
        blocks = blocks.narrow(cut.dim, cut.start // unit, cut.size // unit)
        scales = scales.narrow(cut.dim, cut.start // unit, cut.size // unit)
    decode_mxfp4(blocks, scales, item.target)


def fill_random(
    items: list[LoadItem], progress: Callable[[int, int], None] | None = None, seed: int = 0
) -> LoadReport:
    """Random weights of sane scale (normal, 1/sqrt(inputs)), norms as ones; drawn on the device itself."""
    total = sum(item.num_bytes for item in items)
    done = 0
    generators: dict[torch.device, torch.Generator] = {}
    for item in items:
        target, device = item.target, item.device
        if device not in generators:
            # A rehearsal's tensors have no memory, and their device no generator.
            generators[device] = torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)
        generator = generators[device]
        if isinstance(item, StoredMatrix):
            item.randomize(generator)
        elif item.constant is not None:
            target.fill_(item.constant)
        elif item.store is not None:
            size = target.shape[-1]
            for index, rows in item.blocks():
                drawn = torch.empty((rows.stop - rows.start, size), dtype=torch.float32, device=device)
                item.fill_rows(index, rows, drawn.normal_(0.0, size**-0.5, generator=generator))
        else:
            spread = target.shape[-1] ** -0.5 if target.dim() > 1 else 0.02
            target.normal_(0.0, spread, generator=generator)
        done += item.num_bytes
        if progress:
            progress(done, total)
    return LoadReport(len(items), total, ())
