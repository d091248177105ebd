"""Rope parameters as checkpoints write them -> the frequencies a block uses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from octavo.errors import UnsupportedModelError
from octavo.model.blocks import Rope


def build_rope(head_dim: int, parameters: Mapping[str, Any], max_position: int) -> Rope:
    """Inverse frequencies for rope_type default, linear, llama3 or yarn (Peng et al. 2023)."""
    theta = float(parameters.get("rope_theta", 10000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default")) or "default"
    dim = int(head_dim * float(parameters.get("partial_rotary_factor", 1.0) or 1.0)) // 2 * 2
    plain = [theta ** (-2.0 * i / dim) for i in range(dim // 2)]
    if kind == "default":
        return Rope(dim, tuple(plain))
    if kind == "factors":  # GGUF's rope_freqs tensor: one divisor a frequency
        return Rope(dim, tuple(f / d for f, d in zip(plain, parameters["factors"], strict=True)))
    factor = float(parameters.get("factor", 1.0))
    if kind == "linear":
        return Rope(dim, tuple(f / factor for f in plain))
    if kind == "llama3":
        return Rope(dim, tuple(_llama3(f, factor, parameters) for f in plain))
    raise UnsupportedModelError(f"Rope scaling {kind!r} is not supported.")


def _llama3(frequency: float, factor: float, parameters: Mapping[str, Any]) -> float:
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    original = float(parameters["original_max_position_embeddings"])
    wavelength = 2 * math.pi / frequency
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency
