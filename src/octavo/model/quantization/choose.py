"""Which format each matrix of a model gets: what its files hold decides, ``--quantization`` only what is quantized on load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from octavo.device.ops.bind import OpSpec
from octavo.device.ops.fp8 import MIN_CAPABILITY
from octavo.errors import UsageError
from octavo.files.base import ModelFiles
from octavo.model.blocks import DecoderSpec, Experts, Linear, Part
from octavo.model.layers.load import Cut, LoadItem
from octavo.model.quantization.awq import AwqCodes
from octavo.model.quantization.base import Stack, Weight, WeightFormat
from octavo.model.quantization.compressed import CompressedCodes
from octavo.model.quantization.dense import DENSE, DenseWeight
from octavo.model.quantization.describe import Quantization, Scheme, describe_quantization
from octavo.model.quantization.experts import ByteCodes, Fp8Stack, Int8Stack
from octavo.model.quantization.floats4 import DeepseekFp4Codes, Mxfp4Codes, Nf4Codes, Nvfp4Codes
from octavo.model.quantization.fp8 import (
    BlockFp8Weight,
    CompressedBlockFp8Weight,
    DeepseekBlockFp8Weight,
    Fp8Weight,
    StoredFp8Weight,
)
from octavo.model.quantization.gguf import LAYOUTS, GgufCodes
from octavo.model.quantization.gptq import GptqCodes
from octavo.model.quantization.int4 import Int4Weight
from octavo.model.quantization.int8 import Int8Weight, StoredInt8Weight
from octavo.model.quantization.packed import Codes, LoadedPackedWeight, PackedWeight, StoredPackedWeight

if TYPE_CHECKING:
    from octavo.model.layers.build import Build

Make = Callable[[int, int, "Build"], Weight]
EXPERTS: dict[str, Callable[[int, int, Build], LoadedPackedWeight]] = {
    "fp8": Fp8Stack,
    "int8": Int8Stack,
    "int4": partial(Int4Weight, stack=True),
}
ON_LOAD: dict[str, Make] = {"fp8": Fp8Weight, "int8": Int8Weight, "int4": Int4Weight}
CODES: dict[str, Callable[[Scheme, torch.dtype], Codes]] = {
    "awq": AwqCodes,
    "gptq": GptqCodes,
    "gptq_v2": GptqCodes,
    "compressed": CompressedCodes,
}
BLOCKS: dict[str, Make] = {
    "fp8": BlockFp8Weight,
    "compressed": CompressedBlockFp8Weight,
    "deepseek_v4": DeepseekBlockFp8Weight,
}
PLAIN = ("F32", "F16", "BF16")
ALIASES = {"awq_marlin": "awq", "gptq_marlin": "gptq", "modelopt_fp4": "modelopt", "gpt_oss_mxfp4": "mxfp4"}


class SplitWeight:
    """Parts of one matrix that are stored differently, side by side."""

    def __init__(self, weights: list[Weight], sizes: list[int]) -> None:
        self.weights = weights
        self.rows: list[slice] = []
        for size in sizes:
            start = self.rows[-1].stop if self.rows else 0
            self.rows.append(slice(start, start + size))

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See ``Weight``."""
        out = x.new_empty((x.shape[0], self.rows[-1].stop))
        for weight, rows in zip(self.weights, self.rows):
            part = None if bias is None else bias[rows]
            if isinstance(weight, PackedWeight):
                weight.multiply_into(out[:, rows], x, part)
            else:
                out[:, rows] = weight.multiply(x, part)
        return out

    def item(self, hf: str, gguf: str, rows: slice, part: Part, cut: Cut | None) -> LoadItem:
        """See ``Weight``."""
        for weight, own in zip(self.weights, self.rows):
            if own.start <= rows.start and rows.stop <= own.stop:
                return weight.item(hf, gguf, slice(rows.start - own.start, rows.stop - own.start), part, cut)
        raise ValueError(f"rows {rows} of {hf} cross the parts of its matrix")


def side_by_side(block: Linear, build: Build, makes: list[Make]) -> Weight:
    """One matrix of the parts that are made alike, several where they are not."""
    runs: list[tuple[Make, int]] = []
    for make, part in zip(makes, block.parts):
        if runs and runs[-1][0] == make:
            runs[-1] = make, runs[-1][1] + part.out_features
        else:
            runs.append((make, part.out_features))
    weights = [make(size, block.in_features, build) for make, size in runs]
    return weights[0] if len(weights) == 1 else SplitWeight(weights, [size for _, size in runs])


@dataclass(frozen=True)
class OnLoadFormat:
    """Plain weights, quantized while they are loaded. See ``WeightFormat``."""

    name: str

    covers_head: ClassVar[bool] = False

    @property
    def has_fp8(self) -> bool:
        """See ``WeightFormat``."""
        return self.name == "fp8"

    def allocate(self, block: Linear, build: Build, hf_prefix: str = "", gguf_prefix: str = "") -> Weight:
        """See ``WeightFormat``."""
        return ON_LOAD[self.name](block.out_features, block.in_features, build)

    def allocate_experts(
        self, block: Experts, build: Build, hf_prefix: str, gguf_prefix: str
    ) -> tuple[Stack, Stack]:
        """See ``WeightFormat``."""
        make = EXPERTS[self.name]
        gate_up, down = stack_shapes(block)
        return make(*gate_up, build), make(*down, build)


@dataclass(frozen=True)
class GgufFormat:
    """Blocks of a GGUF file kept quantized. See ``WeightFormat``."""

    files: ModelFiles

    covers_head: ClassVar[bool] = True
    has_fp8: ClassVar[bool] = False

    def allocate(self, block: Linear, build: Build, hf_prefix: str = "", gguf_prefix: str = "") -> Weight:
        """See ``WeightFormat``; types this format does not keep are decoded."""
        makes: list[Make] = []
        for part in block.parts:
            info = self.files.tensors.get(f"{gguf_prefix}{part.gguf}.weight")
            kept = info is not None and info.dtype in LAYOUTS
            makes.append(_packed(GgufCodes(info.dtype)) if kept and info is not None else DenseWeight)
        return side_by_side(block, build, makes)

    def allocate_experts(
        self, block: Experts, build: Build, hf_prefix: str, gguf_prefix: str
    ) -> tuple[Stack, Stack] | None:
        """See ``WeightFormat``."""
        infos = [self.files.tensors.get(f"{gguf_prefix}{name}.weight") for name in block.gguf_each]
        kinds = [info.dtype if info is not None else "" for info in infos]
        if kinds[0] != kinds[1] or kinds[0] not in LAYOUTS or kinds[2] not in LAYOUTS:
            return None
        return stored_stacks(GgufCodes(kinds[0]), GgufCodes(kinds[2]), block, build)


@dataclass(frozen=True)
class CheckpointFormat:
    """What a Hugging Face checkpoint says of its modules. See ``WeightFormat``."""

    quantization: Quantization
    files: ModelFiles
    rename: Callable[[str], str]

    covers_head: ClassVar[bool] = True

    @property
    def has_fp8(self) -> bool:
        """See ``WeightFormat``."""
        return any(scheme.kind == "fp8" and not scheme.group for scheme in self.quantization.schemes())

    def allocate(self, block: Linear, build: Build, hf_prefix: str = "", gguf_prefix: str = "") -> Weight:
        """See ``WeightFormat``."""
        return side_by_side(
            block, build, [self._make(self.rename(hf_prefix + part.hf)) for part in block.parts]
        )

    def allocate_experts(
        self, block: Experts, build: Build, hf_prefix: str, gguf_prefix: str
    ) -> tuple[Stack, Stack] | None:
        """See ``WeightFormat``; what one expert is, all are."""
        module = self.rename(hf_prefix + block.hf)
        scheme = self.quantization.of(f"{module}.0.{block.hf_each[0]}")
        last = self.quantization.of(f"{module}.0.{block.hf_each[2]}")
        if scheme is None or last is None:
            return None
        return stored_stacks(
            self._codes(scheme, f"{module}.0.{block.hf_each[0]}"),
            self._codes(last, f"{module}.0.{block.hf_each[2]}"),
            block,
            build,
        )

    def _codes(self, scheme: Scheme, module: str) -> Codes:
        """How a scheme's codes are stored."""
        if scheme.kind == "int":
            return CODES[scheme.source](scheme, self._half(module))
        if scheme.kind == "nf4":
            return Nf4Codes()
        if scheme.kind in ("nvfp4", "mxfp4"):
            own = DeepseekFp4Codes() if scheme.source == "deepseek_v4" else Mxfp4Codes()
            return Nvfp4Codes(scheme) if scheme.kind == "nvfp4" else own
        return ByteCodes(scheme)

    def _make(self, module: str) -> Make:
        scheme = self.quantization.of(module)
        plain = self.files.tensors.get(f"{module}.weight")
        if scheme is None or (plain is not None and plain.dtype in PLAIN):
            return DenseWeight
        if scheme.kind == "fp8" and scheme.group:
            return BLOCKS[scheme.source]
        if scheme.kind in ("fp8", "int8"):
            return StoredFp8Weight if scheme.kind == "fp8" else StoredInt8Weight
        return _packed(self._codes(scheme, module))

    def _half(self, module: str) -> torch.dtype:
        """The type of the module's 16-bit scales."""
        found = [self.files.tensors.get(f"{module}.{name}") for name in ("scales", "weight_scale")]
        return torch.bfloat16 if any(info and info.dtype == "BF16" for info in found) else torch.float16


@dataclass(frozen=True)
class _Packed:
    """Makes matrices of one kind of codes; equal where they can share one."""

    codes: Codes

    def __call__(self, out_features: int, in_features: int, build: Build) -> Weight:
        return StoredPackedWeight(self.codes, out_features, in_features, build)


def stack_shapes(block: Experts) -> tuple[tuple[int, int], tuple[int, int]]:
    """(outputs, inputs) of both stacks of a layer's experts."""
    inner, hidden = block.intermediate, block.hidden
    return (block.num * 2 * inner, hidden), (block.num * hidden, inner)


def stored_stacks(gate_up: Codes, down: Codes, block: Experts, build: Build) -> tuple[Stack, Stack]:
    """Both stacks, to be filled with stored codes."""
    first, last = stack_shapes(block)
    return (
        StoredPackedWeight(gate_up, *first, build, stack=True),
        StoredPackedWeight(down, *last, build, stack=True),
    )


def _packed(codes: Codes) -> Make:
    return _Packed(codes)


def choose_format(
    asked: str | None,
    decoder: DecoderSpec,
    spec: OpSpec,
    files: ModelFiles | None = None,
    rename: Callable[[str], str] = lambda name: name,
) -> WeightFormat:
    """The format of the decoder's projections: that of the files, or what ``--quantization`` makes of plain ones.

    GGUF blocks stay quantized on GPUs (elsewhere with "gguf" alone). ``rename`` gives a module's name in the files. Raises
    ``UsageError`` for a name that contradicts the files or is none, and for a device that lacks the arithmetic.
    """
    asked = ALIASES.get(asked, asked) if asked else None
    held = describe_quantization(files.config) if files is not None and files.format != "gguf" else None
    if held is not None and files is not None:
        if asked not in (None, held.method):
            raise UsageError(
                f"--quantization {asked}: {files.name} is quantized already, as {held.method}.",
                "Leave --quantization out, or use the unquantized model.",
            )
        if held.method == "mxfp4" and asked is None and spec.device == "cpu":
            return DENSE  # decoded: there is no kernel to be fast with
        for scheme in held.schemes():
            _check_device(scheme.kind, held.method, spec)
        return CheckpointFormat(held, files, rename)
    if (
        files is not None
        and files.format == "gguf"
        and (asked == "gguf" or (asked is None and spec.device == "cuda"))
    ):
        return GgufFormat(files)
    if asked is None:
        return DENSE
    if asked not in ON_LOAD:
        raise UsageError(
            f"--quantization {asked}: the model's files are not quantized so, and it is none that is applied on load here.",
            f"Leave it out, or use one of {', '.join(ON_LOAD)}.",
        )
    _check_device(asked, asked, spec)
    return OnLoadFormat(asked)


def _check_device(kind: str, method: str, spec: OpSpec) -> None:
    if kind == "fp8" and spec.device == "cuda" and spec.capability < MIN_CAPABILITY:
        raise UsageError(
            f"--quantization {method} needs a GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell); this one "
            f"has {spec.capability // 10}.{spec.capability % 10}.",
            "Run without --quantization, or use a smaller model.",
        )
