"""Checkpoint tensors into panels: names, row order, one repacking pass, no second copy kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from octavo.device.kernels.numba import formats
from octavo.errors import ModelFileError
from octavo.files.base import ModelFiles, TensorInfo
from octavo.files.mapped import forget
from octavo.model.blocks import DecoderSpec, Embedding, Experts, Linear, Norm, Part
from octavo.model.quantization.gguf_blocks import dequantize_blocks, quantize_blocks
from octavo.runner.cpu.packing import Packer
from octavo.runner.cpu.program import Arena

T = TypeVar("T", np.uint8, np.float32)
PLAIN = "plain"
PACK_BYTES = 8 << 20  # raw bytes repacked at a time: bounds the temporary copies


@dataclass(frozen=True)
class Panels:
    """Some output rows of a linear, packed. ``quantized``: tokens must be int8, else float32."""

    kernel: str
    code: int
    quantized: bool
    weights: NDArray[np.uint8]  # [panels, bytes]
    scales: NDArray[np.uint8]  # [panels, bytes], empty for plain weights
    in_features: int
    out_features: int
    bias: NDArray[np.float32] | None = None
    lower: NDArray[np.uint8] | None = None  # the second plane of a split matrix [panels, bytes]

    @property
    def nbytes(self) -> int:
        """Bytes that a pass over the matrix reads."""
        return self.weights.nbytes + self.scales.nbytes + (0 if self.lower is None else self.lower.nbytes)


def stored_as(dtype: str, quantization: str | None) -> str:
    """The type a matrix of a file's ``dtype`` has in memory."""
    return quantization if quantization and dtype in formats.DENSE_CODES else dtype


def form_of(stored: str, splits: bool = False) -> formats.PanelFormat | None:
    """How a stored type is packed, None for plain numbers; ``splits``: in two planes where the type has that form."""
    form = formats.BY_DTYPE.get(stored)
    return formats.SPLIT8 if splits and form is formats.ZERO8 else form


def head_names(spec: DecoderSpec, files: ModelFiles) -> set[str]:
    """The tensors of the output matrix."""
    gguf = files.format == "gguf"
    parts = spec.head.parts if spec.head is not None else (spec.embedding,)
    return {(part.gguf if gguf else part.hf) + ".weight" for part in parts}


def kernel_of(stored: str, splits: bool = False) -> str:
    """The kernel that multiplies a stored type."""
    form = form_of(stored, splits)
    return f"linear_{form.name}" if form else f"dense_{stored.lower()}"


def forms(users: list[Panels]) -> tuple[bool, bool]:
    """(float32 wanted, int8 wanted) by the linears that read a buffer."""
    return any(not user.quantized for user in users), any(user.quantized for user in users)


def expert_names(block: Experts, gguf: bool, prefix: str) -> list[list[str]]:
    """Tensors of the gates, the up and the down projections: one of all experts in GGUF files, one each in others."""
    if gguf:
        return [[f"{prefix}{name}.weight"] for name in block.gguf_each]
    return [[f"{prefix}{block.hf}.{i}.{name}.weight" for i in range(block.num)] for name in block.hf_each]


class WeightReader:
    """Reads a model's tensors by the names of its blocks and counts what was used.

    ``quantization`` ("Q8_0", "Q4_0", "Q4_1"): store plain matrices that way (the token embedding as Q8_0).
    """

    def __init__(
        self,
        files: ModelFiles,
        spec: DecoderSpec,
        packer: Packer,
        progress: Callable[[int, int], None] | None = None,
        quantization: str | None = None,
    ) -> None:
        self.files = files
        self.packer = packer
        self.spec = spec
        self.gguf = files.format == "gguf"
        self.progress = progress
        self.total = sum(info.nbytes for info in files.tensors.values())
        self.done = 0
        self.used: set[str] = set()
        self.arena = Arena()
        self.heads = head_names(spec, files)
        self.quantization = quantization

    def prefix(self, layer: int) -> str:
        """What the names of a layer's tensors begin with."""
        return (self.spec.gguf_layer_prefix if self.gguf else self.spec.hf_layer_prefix).format(layer)

    def linear(self, linear: Linear, prefix: str, quantize: bool = True) -> list[Panels]:
        """All parts of a linear in order; neighbours of one type become one matrix. Without ``quantize`` plain matrices
        stay plain: few rows that decide much."""
        groups: list[list[Part]] = []
        for part in linear.parts:
            if groups and self._info(prefix, part).dtype == self._info(prefix, groups[-1][-1]).dtype:
                groups[-1].append(part)
            else:
                groups.append([part])
        return [self._pack(parts, linear, prefix, "" if quantize else PLAIN) for parts in groups]

    def experts(self, block: Experts, prefix: str) -> tuple[Panels, Panels, Panels]:
        """Gate, up and down projections of all experts, one below the other."""
        sizes = [(block.intermediate, block.hidden)] * 2 + [(block.hidden, block.intermediate)]
        found = [
            self._stack(names, block.num, *size)
            for names, size in zip(expert_names(block, self.gguf, prefix), sizes)
        ]
        return found[0], found[1], found[2]

    def _stack(self, names: list[str], num: int, rows: int, inputs: int) -> Panels:
        """One run of panels of ``num`` matrices [rows, inputs], ``rows`` being a multiple of 16."""
        each = num // len(names)
        dtypes = {self._tensor(name).dtype for name in names}
        if len(dtypes) > 1:
            raise ModelFileError(f"{self.files.name}: {names[0]} and its like have types {sorted(dtypes)}.")
        dtype = dtypes.pop()
        stored = stored_as(dtype, self.quantization)
        form, panels = form_of(stored), num * rows // formats.ROWS
        body = form.panel_bytes(inputs) if form else inputs * formats.ROWS * formats.DENSE_BYTES[stored]
        weights = self.arena.take((panels, body))
        scales = self.arena.take((panels, form.scale_bytes(inputs) if form else 0))
        step = each * rows // formats.ROWS
        for i, name in enumerate(names):
            expected = (rows, inputs) if each == 1 and not self.gguf else (each, rows, inputs)
            if self.files.tensors[name].shape != expected:
                shape = self.files.tensors[name].shape
                raise ModelFileError(f"{self.files.name}: {name} has shape {shape}, expected {expected}.")
            raw = self._read(name)
            target = weights[i * step : (i + 1) * step], scales[i * step : (i + 1) * step], None
            self._fill((dtype, stored), raw.reshape(each * rows, -1), None, inputs, *target)
            forget(raw)
        code = form.code if form else formats.DENSE_CODES[stored]
        return Panels(kernel_of(stored), code, form is not None, weights, scales, inputs, rows)

    def embedding(self, embedding: Embedding) -> Panels:
        """The token embedding as panels (also the output matrix where it is tied)."""
        part = Part(embedding.hf, embedding.gguf, embedding.vocab_size)
        return self._pack([part], Linear(embedding.hidden, (part,)), "", "Q8_0")

    def norm(self, norm: Norm, prefix: str) -> NDArray[np.float32]:
        """A norm's weights with its offset added (GGUF files hold the sum)."""
        name = prefix + (norm.gguf if self.gguf else norm.hf) + ".weight"
        values = self._floats(name, norm.size)
        return values if self.gguf else values + np.float32(norm.offset)

    def finish(self) -> None:
        """Raise ``ModelFileError`` where the file holds tensors that nothing used."""
        unused = [
            name
            for name in self.files.tensors
            if name not in self.used and not any(ignored in name for ignored in self.spec.ignored)
        ]
        tied = {"lm_head.weight", "output.weight"} if self.spec.head is None else set()
        unused = [name for name in unused if name not in tied and name != "rope_freqs.weight"]
        if unused:
            raise ModelFileError(
                f"{self.files.name} holds {len(unused)} tensors that this architecture does not use: "
                f"{', '.join(unused[:5])}.",
                "The file may belong to a variant of the architecture that is not supported.",
            )

    def _name(self, prefix: str, part: Part) -> str:
        return prefix + (part.gguf if self.gguf else part.hf)

    def _info(self, prefix: str, part: Part) -> TensorInfo:
        return self._tensor(self._name(prefix, part) + ".weight")

    def _tensor(self, name: str) -> TensorInfo:
        if name not in self.files.tensors:
            raise ModelFileError(f"{self.files.name} has no tensor {name}.", "Download the model again.")
        return self.files.tensors[name]

    def _floats(self, name: str, size: int) -> NDArray[np.float32]:
        """A vector of plain numbers as float32."""
        if name not in self.files.tensors:
            raise ModelFileError(f"{self.files.name} has no tensor {name}.", "Download the model again.")
        info = self.files.tensors[name]
        if info.dtype not in formats.DENSE_CODES or info.shape != (size,):
            raise ModelFileError(
                f"{self.files.name}: {name} is {info.dtype} {info.shape}, expected ({size},)."
            )
        raw = self._read(name)
        if info.dtype == "BF16":
            wide = raw.view(np.uint16).astype(np.uint32) << np.uint32(16)
            return wide.view(np.float32)
        return raw.view(np.float32 if info.dtype == "F32" else np.float16).astype(np.float32)

    def _read(self, name: str) -> NDArray[np.uint8]:
        raw = self.files.read(name)
        self.done += 0 if name in self.used else raw.nbytes
        self.used.add(name)
        if self.progress is not None:
            self.progress(self.done, self.total)
        return raw

    def _pack(self, parts: list[Part], linear: Linear, prefix: str, coarsest: str = "") -> Panels:
        """Repack neighbouring parts of one type into one run of panels; the last one is padded with zero rows.
        ``coarsest``: what plain numbers are quantized to instead of the model's type, or ``PLAIN``."""
        inputs, dtype = linear.in_features, self._info(prefix, parts[0]).dtype
        wanted = None if coarsest == PLAIN else self.quantization and (coarsest or self.quantization)
        stored = stored_as(dtype, wanted)
        outputs = sum(part.out_features for part in parts)
        panels = -(-outputs // formats.ROWS)
        form = form_of(stored, self._name(prefix, parts[0]) + ".weight" in self.heads)
        lower = None
        if form is not None and form.split:
            size = inputs // formats.BLOCK
            shape = (panels, size * form.planes[0]), (panels, form.scale_bytes(inputs))
            lower = self.arena.take((panels, size * form.planes[1]))
        elif form is not None:
            shape = (panels, form.panel_bytes(inputs)), (panels, form.scale_bytes(inputs))
        else:
            shape = (panels, inputs * formats.ROWS * formats.DENSE_BYTES[stored]), (panels, 0)
        weights, scales = self.arena.take(shape[0]), self.arena.take(shape[1])
        bias = np.zeros(panels * formats.ROWS, np.float32) if linear.bias else None
        first = 0
        for part in parts:
            self._check(prefix, part, inputs)
            name = self._name(prefix, part)
            whole = self._read(name + ".weight")
            raw = self._rows(whole.reshape(part.total or part.out_features, -1), part)
            order = self._order(part)
            panel = first // formats.ROWS
            target = weights[panel:], scales[panel:], None if lower is None else lower[panel:]
            self._fill((dtype, stored), raw, order, inputs, *target)
            forget(whole)
            if bias is not None:
                values = self._rows(self._floats(name + ".bias", part.total or part.out_features), part)
                bias[first : first + part.out_features] = values if order is None else values[order]
            first += part.out_features
        kernel = f"linear_{form.name}" if form else kernel_of(stored)
        code = form.code if form else formats.DENSE_CODES[stored]
        return Panels(kernel, code, form is not None, weights, scales, inputs, outputs, bias, lower)

    def _check(self, prefix: str, part: Part, inputs: int) -> None:
        info = self._info(prefix, part)
        expected = part.total or part.out_features, inputs
        if info.shape != expected and (expected[0] > 1 or info.shape != (inputs,)):  # one row may be a vector
            raise ModelFileError(
                f"{self.files.name}: {info.name} has shape {info.shape}, expected {expected}."
            )

    def _rows(self, stored: NDArray[T], part: Part) -> NDArray[T]:
        """A part's own rows of a tensor that several may share."""
        return stored[part.start : part.start + part.out_features]

    def _order(self, part: Part) -> NDArray[np.int64] | None:
        """Rows in the order that puts each head's rotary halves one after the other."""
        heads = part.heads if self.gguf else part.hf_heads
        if not heads:
            return None
        rows = np.arange(part.out_features).reshape(heads, -1)
        rotated = part.rotated or rows.shape[1]
        pairs = rows[:, :rotated].reshape(heads, -1, 2).transpose(0, 2, 1).reshape(heads, rotated)
        return np.concatenate([pairs, rows[:, rotated:]], axis=1).reshape(-1)

    def _fill(
        self,
        dtypes: tuple[str, str],
        raw: NDArray[np.uint8],
        order: NDArray[np.int64] | None,
        inputs: int,
        weights: NDArray[np.uint8],
        scales: NDArray[np.uint8],
        lower: NDArray[np.uint8] | None,
    ) -> None:
        """Pack rows piece by piece, so that temporaries stay small; ``dtypes``: of the file, of the panels."""
        dtype, stored = dtypes
        step = max(formats.ROWS, PACK_BYTES // raw.shape[1] // formats.ROWS * formats.ROWS)
        for start in range(0, len(raw), step):
            piece = raw[start : start + step] if order is None else raw[order[start : start + step]]
            if stored != dtype:
                values = dequantize_blocks(piece.reshape(-1), dtype)
                piece = quantize_blocks(values, stored).reshape(len(piece), -1)
            if len(piece) % formats.ROWS:
                padding = np.zeros((-len(piece) % formats.ROWS, piece.shape[1]), np.uint8)
                piece = np.concatenate([piece, padding])
            panel = start // formats.ROWS
            body = weights[panel : panel + len(piece) // formats.ROWS]
            count = len(body)
            if stored in formats.BY_DTYPE:
                second = None if lower is None else lower[panel : panel + count]
                self.packer.pack(stored, piece, inputs, body, scales[panel : panel + count], second)
            else:
                formats.pack_dense(stored, piece, body)
