"""4-bit floats as files hold them: MXFP4 (gpt-oss), NVFP4 (ModelOpt, compressed-tensors), NF4 (bitsandbytes)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from octavo.device.ops.packed import NF4, Layout
from octavo.errors import ModelFileError
from octavo.model.layers.load import Source
from octavo.model.quantization.describe import Scheme
from octavo.model.quantization.packed import Rows, choose_width, shaped

MXFP4_GROUP, NVFP4_GROUP, NF4_GROUP, NF4_NESTED = 32, 16, 64, 256
NF4_CODE = "quant_state.bitsandbytes__nf4"


def low_first(packed: Tensor) -> Tensor:
    """Bytes [.., n] as codes [.., 2 n], those of the low nibbles first in each pair."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


class NoOrder:
    """Inputs lie in their order."""

    def order(self, stored: Mapping[str, Tensor], inputs: int) -> Tensor | None:
        """See ``Codes``."""
        return None


@dataclass(frozen=True)
class Mxfp4Codes(NoOrder):
    """Stacks [E, rows, K / 32, 16] of bytes, and exponents [E, rows, K / 32] (OCP Microscaling Formats 1.0). See ``Codes``."""

    def layout(self, inputs: int) -> Layout:
        """See ``Codes``; scales are powers of two, which bfloat16 holds."""
        return Layout(4, 0, choose_width(32, inputs), 32, code="e2m1", half=torch.bfloat16)

    def sources(self, hf: str, gguf: str) -> tuple[Source, ...]:
        """See ``Codes``."""
        return Source("packed", f"{hf}_blocks"), Source("scales", f"{hf}_scales")

    def read(self, stored: Mapping[str, Tensor], rows: Tensor, inputs: int) -> Rows:
        """See ``Codes``; the rows of all experts are counted through."""
        groups = inputs // MXFP4_GROUP
        packed = shaped(stored, "packed", -1, -1, groups, 16, kind=torch.uint8).flatten(0, 1)[rows]
        exponents = shaped(stored, "scales", -1, -1, groups, kind=torch.uint8).flatten(0, 1)[rows]
        scale = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - 127)
        return Rows(low_first(packed).flatten(1), scale.bfloat16())


@dataclass(frozen=True)
class DeepseekFp4Codes(NoOrder):
    """The same, matrix by matrix: bytes [N, K / 2], exponents [N, K / 32] (DeepSeek V4's experts). See ``Codes``."""

    def layout(self, inputs: int) -> Layout:
        """See ``Codes``."""
        return Mxfp4Codes().layout(inputs)

    def sources(self, hf: str, gguf: str) -> tuple[Source, ...]:
        """See ``Codes``."""
        return Source("packed", f"{hf}.weight"), Source("scales", f"{hf}.scale")

    def read(self, stored: Mapping[str, Tensor], rows: Tensor, inputs: int) -> Rows:
        """See ``Codes``."""
        packed = shaped(stored, "packed", -1, inputs // 2, kind=torch.int8).view(torch.uint8)[rows]
        scales = shaped(stored, "scales", -1, inputs // MXFP4_GROUP, kind=torch.float8_e8m0fnu)
        return Rows(low_first(packed), scales.float()[rows].bfloat16())


@dataclass(frozen=True)
class Nvfp4Codes(NoOrder):
    """Bytes [N, K / 2], 8-bit float scales [N, K / 16], and one for the whole matrix: a factor (ModelOpt's
    ``weight_scale_2``) or a divisor (compressed-tensors' ``weight_global_scale``). See ``Codes``."""

    scheme: Scheme

    def layout(self, inputs: int) -> Layout:
        """See ``Codes``."""
        return Layout(4, 0, 16, NVFP4_GROUP, code="e2m1", scales="e4m3")

    def sources(self, hf: str, gguf: str) -> tuple[Source, ...]:
        """See ``Codes``; scales of activations are not needed."""
        modelopt = self.scheme.source == "modelopt"
        return (
            Source("packed", f"{hf}.weight" if modelopt else f"{hf}.weight_packed"),
            Source("scale", f"{hf}.weight_scale"),
            Source("outer", f"{hf}.weight_scale_2" if modelopt else f"{hf}.weight_global_scale"),
            Source("input_scale", f"{hf}.input_scale", required=False),
            Source("input_global_scale", f"{hf}.input_global_scale", required=False),
        )

    def read(self, stored: Mapping[str, Tensor], rows: Tensor, inputs: int) -> Rows:
        """See ``Codes``."""
        packed = shaped(stored, "packed", -1, inputs // 2, kind=torch.uint8)[rows]
        scale = shaped(stored, "scale", -1, inputs // NVFP4_GROUP, kind=torch.float8_e4m3fn)
        outer = stored["outer"].float().reshape(1)
        if self.scheme.source != "modelopt":
            outer = 1 / outer
        fields = scale.view(torch.uint8)[rows].view(scale.dtype)
        return Rows(low_first(packed), fields, outer.expand(len(rows)).unsqueeze(1).contiguous())


@dataclass(frozen=True)
class Nf4Codes(NoOrder):
    """bitsandbytes: bytes [N K / 2, 1], high nibble first, and a scale for 64 weights: float32, or 8-bit codes of a table
    with scales for 256 of them and an offset (Dettmers et al. 2023). See ``Codes``."""

    def layout(self, inputs: int) -> Layout:
        """See ``Codes``."""
        return Layout(4, 0, choose_width(NF4_GROUP, inputs), NF4_GROUP, code="nf4", scales="float")

    def sources(self, hf: str, gguf: str) -> tuple[Source, ...]:
        """See ``Codes``."""
        name = f"{hf}.weight"
        optional = ("nested_absmax", "nested_quant_map")
        return (
            Source("packed", name),
            Source("absmax", f"{name}.absmax"),
            Source("quant_map", f"{name}.quant_map"),
            *(Source(key, f"{name}.{key}", required=False) for key in optional),
            Source("state", f"{name}.{NF4_CODE}"),
        )

    def read(self, stored: Mapping[str, Tensor], rows: Tensor, inputs: int) -> Rows:
        """See ``Codes``."""
        if inputs % NF4_GROUP:
            raise ModelFileError(f"bitsandbytes weights of {inputs} inputs share scales between outputs.")
        table = torch.tensor(NF4, device=rows.device)
        if not torch.allclose(shaped(stored, "quant_map", 16).float(), table, atol=1e-6):
            raise ModelFileError("bitsandbytes weights with a table that is not NF4's are not supported.")
        packed = stored["packed"].reshape(-1, inputs // 2)[rows]
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten(-2)
        absmax = stored["absmax"]
        if "nested_absmax" in stored:
            nested = stored["nested_absmax"].float().repeat_interleave(NF4_NESTED)[: absmax.numel()]
            values = stored["nested_quant_map"].float()[absmax.long()]
            absmax = values * nested + nested_offset(stored["state"])
        return Rows(codes, absmax.float().view(-1, inputs // NF4_GROUP)[rows])


def nested_offset(state: Tensor) -> float:
    """``nested_offset`` in a matrix's state, which is JSON in bytes."""
    try:
        found = msgspec.json.decode(bytes(state.cpu().numpy().tobytes()))
        return float(found["nested_offset"])
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        raise ModelFileError("bitsandbytes weights have no nested_offset in their state.") from None
