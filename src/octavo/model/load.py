"""Fills parameters from model files: streamed tensor by tensor, strict about what is missing or left over."""

from __future__ import annotations

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
from octavo.model.layers.load import LoadItem
from octavo.model.quantization.decode import dequantize
from octavo.model.quantization.mxfp4 import BLOCK, decode_mxfp4

TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QKV = 3  # what lies together in a head of a tensor stored "per_head"
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
    total = sum(files.tensors[name].nbytes for name in {name for name, _ in found})
    done, seen = 0, set()
    for name, item in found:
        if item.scales:
            read_mxfp4(item, files, name, rename(item.scales))
        else:
            read_into(item, files, name, gguf)
        done += 0 if name in seen else files.tensors[name].nbytes  # several items may share a tensor
        seen.add(name)
        if progress:
            progress(done, total)
    return LoadReport(len(found), total, ignored)


def match(
    items: list[LoadItem], files: ModelFiles, spec: DecoderSpec | EncoderSpec
) -> tuple[list[tuple[str, LoadItem]], tuple[str, ...]]:
    """(stored name, item) of all that must be read, and the names that are known to be of no use.

    Raises ``ModelFileError`` for what is missing, left over, or of another shape; reads headers only.
    """
    gguf, rename = files.format == "gguf", renaming(files, spec)
    items = found_in(items, set(files.tensors), gguf, rename)
    names = [item.gguf if gguf else rename(item.hf) for item in items]
    scales = [rename(item.scales) for item in items if item.scales]
    ignored = check_names(names + scales, files, spec, rename)
    for name, item in zip(names, items):
        info, wanted = files.tensors[name], item.stored_shape(gguf)
        if info.shape != wanted:
            raise ModelFileError(
                f"Tensor {name} has shape {list(info.shape)}, but the configuration asks {list(wanted)}.",
                "The configuration and the weights do not belong together.",
            )
    return list(zip(names, items)), ignored


def renaming(files: ModelFiles, spec: DecoderSpec | EncoderSpec) -> Callable[[str], str]:
    """From a block's name of a tensor to the file's."""
    return (lambda name: name) if files.format == "gguf" else hf_renaming(files, spec.bare_prefix)


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


def hf_renaming(files: ModelFiles, bare_prefix: str = "") -> Callable[[str], str]:
    """How this checkpoint spells a decoder's names: multimodal ones put their language model into a part of its own.

    Old spelling: language_model.model.layers.0..., language_model.lm_head; new: model.language_model.layers.0..., lm_head.
    ``bare_prefix`` is left out by checkpoints of the decoder without its head.
    """
    if bare_prefix and not any(name.startswith(bare_prefix) for name in files.tensors):
        return lambda name: name.removeprefix(bare_prefix)
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
        if item.row_scale is not None:
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
    row_bytes = raw.size // item.target.shape[0]
    for rows in item.blocks():
        shape = (rows.stop - rows.start, item.target.shape[1])
        piece = raw[rows.start * row_bytes : rows.stop * row_bytes]
        item.fill_rows(rows, dequantize(piece, dtype_name, shape))


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


def gate_then_up(rows: Tensor) -> Tensor:
    """[E, 2 I, ...] with gate and up rows taking turns -> all gates, then all ups."""
    return torch.cat((rows[:, ::2], rows[:, 1::2]), dim=1)


def untangle(rows: Tensor, heads: int, rotated: int = 0, start: int = 0) -> Tensor:
    """Rows of each head from interleaved pairs (0, d/2, 1, d/2 + 1, ...) back to halves: ``rotated`` of them (0 = all) from
    row ``start`` of the head on."""
    shape = rows.shape
    by_head = rows.reshape(heads, -1, *shape[1:])
    end = start + (rotated or by_head.shape[1] - start)
    turned = by_head[:, start:end].reshape(heads, -1, 2, *shape[1:]).transpose(1, 2)
    parts = (by_head[:, :start], turned.reshape(heads, end - start, *shape[1:]), by_head[:, end:])
    return torch.cat(parts, dim=1).reshape(shape)


def by_piece(rows: Tensor, heads: int, pieces: tuple[int, ...]) -> Tensor:
    """Rows ordered (head, piece, d) to (piece, head, d); pieces of these sizes, or three of the same."""
    shape = rows.shape
    by_head = rows.reshape(heads, -1, *shape[1:])
    split = torch.split(by_head, list(pieces) or by_head.shape[1] // QKV, dim=1)
    return torch.cat([piece.reshape(-1, *shape[1:]) for piece in split])


def fill_random(
    items: list[LoadItem], progress: Callable[[int, int], None] | None = None, seed: int = 0
) -> LoadReport:
    """Random weights of sane scale (normal, 1/sqrt(inputs)), norms as ones; drawn on the device itself."""
    total = sum(item.target.numel() * item.target.element_size() for item in items)
    done = 0
    generators: dict[torch.device, torch.Generator] = {}
    for item in items:
        target = item.target
        if target.device not in generators:
            generators[target.device] = torch.Generator(target.device).manual_seed(seed)
        if item.constant is not None:
            target.fill_(item.constant)
        elif item.row_scale is not None:
            for rows in item.blocks():
                drawn = torch.empty(target[rows].shape, dtype=torch.float32, device=target.device)
                item.fill_rows(
                    rows, drawn.normal_(0.0, target.shape[1] ** -0.5, generator=generators[target.device])
                )
        else:
            target.normal_(
                0.0,
                target.shape[-1] ** -0.5 if target.dim() > 1 else 0.02,
                generator=generators[target.device],
            )
        done += target.numel() * target.element_size()
        if progress:
            progress(done, total)
    return LoadReport(len(items), total, ())
