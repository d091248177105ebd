"""Rope parameters as checkpoints write them -> the frequencies a block uses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.model.blocks import Rope

KINDS = ("default", "linear", "llama3", "yarn", "longrope")


def build_rope(head_dim: int, parameters: Mapping[str, Any], max_position: int) -> Rope:
    """Inverse frequencies for rope_type default, linear, llama3, yarn (Peng et al. 2023) or longrope (Ding et al. 2024).

    "factors" stands for GGUF's tensor of divisors. Raises ``ModelFileError`` for a missing or absurd parameter and
    ``UnsupportedModelError`` for another type.
    """
    theta = _number(parameters, "rope_theta", 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "su" or "long_factor" in parameters:  # Phi-3's early names for it were "su" and "yarn"
        kind = "longrope"
    dim = int(head_dim * _number(parameters, "partial_rotary_factor", 1.0)) // 2 * 2
    if not 0 < dim <= head_dim:
        raise ModelFileError(f"Rope parameters rotate {dim} values of a head of {head_dim}.")
    plain = [theta ** (-2.0 * i / dim) for i in range(dim // 2)]
    if kind == "default":
        return Rope(dim, tuple(plain))
    if kind == "factors":
        factors = parameters["factors"]
        if len(factors) != len(plain) or not all(f > 0 for f in factors):
            raise ModelFileError(f"rope_freqs.weight must hold {len(plain)} positive numbers.")
        return Rope(dim, tuple(f / d for f, d in zip(plain, factors)))
    if kind == "linear":
        factor = _number(parameters, "factor")
        return Rope(dim, tuple(f / factor for f in plain))
    if kind == "llama3":
        return Rope(dim, tuple(_llama3(f, parameters) for f in plain))
    if kind == "longrope":
        return _longrope(plain, parameters, max_position)
    if kind == "yarn":
        return _yarn(plain, theta, parameters, max_position)
    raise UnsupportedModelError(f"Rope scaling {kind!r} is not supported.", f"Supported: {', '.join(KINDS)}.")


def _number(parameters: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number; None counts as absent."""
    value = parameters.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelFileError(f"The rope parameters have no {key!r}.")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise ModelFileError(f"The rope parameter {key} must be a positive number, got {value!r}.")
    return float(value)


def _llama3(frequency: float, parameters: Mapping[str, Any]) -> float:
    """Long wavelengths are stretched, short ones kept, those between blended (Llama 3.1)."""
    factor = _number(parameters, "factor")
    low, high = _number(parameters, "low_freq_factor"), _number(parameters, "high_freq_factor")
    if not low < high:
        raise ModelFileError(
            f"The rope parameter low_freq_factor {low} must be below high_freq_factor {high}."
        )
    original = _number(parameters, "original_max_position_embeddings")
    wavelength = 2 * math.pi / frequency
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def _longrope(plain: list[float], parameters: Mapping[str, Any], max_position: int) -> Rope:
    """One divisor a frequency, in a set for short and a set for long runs; attention is sharpened by ``scale``."""
    original = _number(parameters, "original_max_position_embeddings", float(max_position))
    sets = []
    for key in ("long_factor", "short_factor"):
        divisors = parameters.get(key)
        if not isinstance(divisors, list) or len(divisors) != len(plain):
            raise ModelFileError(f"The rope parameter {key} must list {len(plain)} numbers.")
        sets.append(tuple(f / _number({key: d}, key) for f, d in zip(plain, divisors)))
    factor = _number(parameters, "factor", max_position / original)
    scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    scale = _number(parameters, "attention_factor", scale)
    return Rope(2 * len(plain), sets[0], scale, short=sets[1], original=int(original))


def _yarn(plain: list[float], theta: float, parameters: Mapping[str, Any], max_position: int) -> Rope:
    """Frequencies that turn often are kept, rare ones stretched by ``factor``; attention is sharpened by ``scale``."""
    dim = 2 * len(plain)
    original = _number(parameters, "original_max_position_embeddings", float(max_position))
    factor = _number(parameters, "factor", max(1.0, max_position / original))

    def index_of(turns: float) -> float:
        """Which frequency turns that many times within the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = (
        index_of(_number(parameters, "beta_fast", 32.0)),
        index_of(_number(parameters, "beta_slow", 1.0)),
    )
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low or 0.001
    stretched = []
    for i, frequency in enumerate(plain):
        share = min(1.0, max(0.0, (i - low) / span))
        stretched.append(frequency / factor * share + frequency * (1 - share))
    return Rope(dim, tuple(stretched), _yarn_scale(parameters, factor))


def _yarn_scale(parameters: Mapping[str, Any], factor: float) -> float:
    def sharpen(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if parameters.get("attention_factor") is not None:
        return _number(parameters, "attention_factor")
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return sharpen(_number(parameters, "mscale")) / sharpen(_number(parameters, "mscale_all_dim"))
    return sharpen(1.0)
