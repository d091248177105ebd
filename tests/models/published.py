"""Checkpoints packed as their formats are published, independent of the code that loads them.

Every packer takes a dense matrix [N, K] and returns the tensors of one module and the values they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ: awq/utils/packing_utils.py
Packer = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


def affine(weight: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K] from 0 to 2^bits - 1, fp16 scales [N, G], zero points [N, G]."""
    outputs, inputs = weight.shape
    size = group if group > 0 else inputs
    parts = weight.view(outputs, -1, size)
    top = 2**bits - 1
    if symmetric:
        scale = (parts.abs().amax(-1) * 2 / top).clamp(min=1e-6).half()
        zero = torch.full_like(scale, 2 ** (bits - 1)).int()
    else:
        low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        scale = ((high - low) / top).clamp(min=1e-6).half()
        zero = (-low / scale.float()).round().clamp(1, top).int()  # from 1 on: GPTQ stores one less
    codes = (parts / scale.float().unsqueeze(-1)).round() + zero.unsqueeze(-1)
    return codes.clamp(0, top).int().view(outputs, inputs), scale, zero


def restored(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(code - zero) * scale."""
    size = codes.shape[1] // scale.shape[1]
    return (codes - zero.repeat_interleave(size, 1)).float() * scale.float().repeat_interleave(size, 1)


def int32(values: Any) -> Tensor:
    """Python integers below 2^32 as int32 of the same bits."""
    return torch.from_numpy(np.asarray(values, dtype=np.uint64).astype(np.uint32).view(np.int32).copy())


def bit_stream(numbers: Tensor, bits: int) -> Tensor:
    """Rows of numbers [R, n] as int32 words [R, n bits / 32], lowest bits first, without gaps."""
    rows = []
    for row in numbers.tolist():
        whole = sum(value << (bits * i) for i, value in enumerate(row))
        rows.append([whole >> (32 * i) & 0xFFFFFFFF for i in range(len(row) * bits // 32)])
    return int32(rows)


def awq(group: int) -> Packer:
    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scale, zero = affine(weight, 4, group, symmetric=False)

        def columns(matrix: Tensor) -> Tensor:  # [R, N] -> [R, N / 8]
            words = []
            for row in matrix.tolist():
                eights = [row[i : i + 8] for i in range(0, len(row), 8)]
                words.append([sum(e[AWQ_ORDER[i]] << (4 * i) for i in range(8)) for e in eights])
            return int32(words)

        stored = {
            "qweight": columns(codes.t()),
            "qzeros": columns(zero.t()),
            "scales": scale.t().contiguous(),
        }
        return stored, restored(codes, scale, zero)

    return pack


def gptq(bits: int, group: int, symmetric: bool = True, act_order: bool = False, v2: bool = False) -> Packer:
    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        inputs = weight.shape[1]
        size = group if group > 0 else inputs
        order = torch.arange(inputs)
        if act_order:  # groups are of inputs in order of importance, which every matrix of the input shares
            order = torch.randperm(inputs, generator=torch.Generator().manual_seed(3))
        codes, scale, zero = affine(weight[:, order], bits, group, symmetric)
        back = torch.argsort(order)
        values = restored(codes, scale, zero)[:, back]
        stored = {
            "qweight": bit_stream(codes[:, back], bits).t().contiguous(),
            "qzeros": bit_stream((zero if v2 else zero - 1).t(), bits),
            "scales": scale.t().contiguous(),
            "g_idx": (torch.arange(inputs) // size)[back].int(),
        }
        return stored, values

    return pack


def compressed(bits: int, group: int, symmetric: bool) -> Packer:
    """By the library's own packing."""
    from compressed_tensors.compressors.pack_quantized.helpers import (  # type: ignore[import-untyped]
        pack_to_int32,
    )

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scale, zero = affine(weight, bits, group, symmetric)
        offset, scale = 2 ** (bits - 1), scale.bfloat16()
        stored = {
            "weight_packed": pack_to_int32((codes - offset).to(torch.int8), bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            zeros = (zero - offset).to(torch.int8)
            stored["weight_zero_point"] = pack_to_int32(zeros, bits, packed_dim=0).contiguous()
        return stored, restored(codes, scale, zero)

    return pack


def fp8(channel: bool, shape: tuple[int, ...] = (), static: bool = True) -> Packer:
    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        largest = weight.abs().amax(1, keepdim=True) if channel else weight.abs().max()
        scale = (largest / 448).float()
        matrix = (weight / scale).to(torch.float8_e4m3fn)
        stored = {"weight": matrix, "weight_scale": scale if channel else scale.reshape(shape)}
        if static:
            stored["input_scale"] = torch.tensor(0.02).reshape(shape)
        return stored, matrix.float() * scale

    return pack


def fp8_blocks(name: str = "weight_scale_inv") -> Packer:
    """A scale for each block of 128 x 128; those at the edges are smaller."""

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = (-(-size // 128) for size in weight.shape)
        scale = torch.empty(rows, columns)
        matrix = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        values = torch.empty(weight.shape)
        for i in range(rows):
            for j in range(columns):
                place = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                scale[i, j] = weight[place].abs().max() / 448
                matrix[place] = (weight[place] / scale[i, j]).to(matrix.dtype)
                values[place] = matrix[place].float() * scale[i, j]
        return {"weight": matrix, name: scale}, values

    return pack


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """Index of the table's entry next to each value."""
    return (values.unsqueeze(-1) - table).abs().argmin(-1)


def nvfp4(modelopt: bool) -> Packer:
    """Groups of 16 with 8-bit float scales under one for the matrix; the first of a pair in the low nibble."""

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        parts = weight.view(weight.shape[0], -1, 16)
        outer = weight.abs().max() / (448 * 6)
        scale = (parts.abs().amax(-1) / 6 / outer).to(torch.float8_e4m3fn)
        whole = outer * scale.float().unsqueeze(-1)
        codes = nearest(parts / whole, E2M1).view(weight.shape)
        packed = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
        stored = {"weight_scale": scale, "input_scale": torch.tensor(0.1)}
        if modelopt:
            stored |= {"weight": packed, "weight_scale_2": outer}
        else:
            stored |= {"weight_packed": packed, "weight_global_scale": (1 / outer).reshape(1)}
            whole = (1 / (1 / outer)) * scale.float().unsqueeze(-1)
        return stored, (E2M1[codes].view(parts.shape) * whole).view(weight.shape)

    return pack


NF4_TABLE = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def nf4(nested: bool) -> Packer:
    """bitsandbytes: blocks of 64, the first of a pair in the high nibble; scales may be quantized in blocks of 256."""

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        parts = weight.reshape(-1, 64)
        absmax = parts.abs().amax(-1)
        stored: dict[str, Tensor] = {"weight.quant_map": NF4_TABLE.clone()}
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "shape": list(weight.shape)}
        if nested:
            offset, table = absmax.mean(), torch.linspace(-1, 1, 256)
            shifted = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
            outer = shifted.abs().amax(-1)
            small = nearest(shifted / outer.unsqueeze(-1), table)
            absmax = (table[small] * outer.unsqueeze(-1)).flatten()[: len(absmax)] + float(offset)
            stored |= {
                "weight.absmax": small.flatten()[: len(absmax)].to(torch.uint8),
                "weight.nested_absmax": outer,
                "weight.nested_quant_map": table,
            }
            state |= {"nested_blocksize": 256, "nested_offset": float(offset)}
        else:
            stored["weight.absmax"] = absmax
        codes = nearest(parts / absmax.unsqueeze(-1), NF4_TABLE)
        flat = codes.flatten()
        stored["weight"] = (flat[::2] << 4 | flat[1::2]).to(torch.uint8).unsqueeze(1)
        raw = bytearray(json.dumps(state).encode())
        stored["weight.quant_state.bitsandbytes__nf4"] = torch.frombuffer(raw, dtype=torch.uint8).clone()
        return stored, (NF4_TABLE[codes] * absmax.unsqueeze(-1)).view(weight.shape)

    return pack


def int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """compressed-tensors' "int-quantized", a scale an output."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scale.bfloat16()}, codes.float() * scale.bfloat16().float()


def quantize_folder(
    folder: Path,
    config: Mapping[str, Any],
    pack: Packer,
    plain: Callable[[str], bool] = lambda module: False,
    change: Callable[[dict[str, Any]], None] = lambda config: None,
) -> Path:
    """Pack every projection of a saved model in place; the folder "dense" inside keeps the values they stand for."""
    path = folder / "model.safetensors"
    found, dense = {}, {}
    for name, tensor in load_file(path).items():
        module = name.removesuffix(".weight")
        projection = tensor.dim() == 2 and ".layers." in name and "gate.weight" not in name
        if not projection or plain(module):
            found[name] = dense[name] = tensor
            continue
        stored, dense[name] = pack(tensor.float())
        found |= {f"{module}.{key}": value.contiguous() for key, value in stored.items()}
    described = json.loads((folder / "config.json").read_text())
    change(described)
    (folder / "dense").mkdir(exist_ok=True)
    (folder / "dense" / "config.json").write_text(json.dumps(described))
    save_file({k: v.contiguous() for k, v in dense.items()}, folder / "dense" / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**described, "quantization_config": dict(config)}))
    save_file(found, path, metadata={"format": "pt"})
    return folder / "dense"
