"""Reads numbers out of model configurations; whatever is missing or absurd is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.errors import ModelFileError

MAX_HEADS = 1 << 16


class Keys:
    """A mapping that says which key is wrong; None counts as absent."""

    def __init__(self, source: Mapping[str, Any], where: str) -> None:
        self.source = source
        self.where = where

    def integer(self, key: str, default: int | None = None, least: int = 1, most: int = 2**31 - 1) -> int:
        """A whole number from ``least`` to ``most``."""
        value = self.source.get(key)
        if value is None:
            if default is None:
                raise ModelFileError(f"{self.where} has no {key!r}.")
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ModelFileError(
                f"{self.where}: {key} must be a whole number from {least} to {most}, got {value!r}."
            )
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        value = self.source.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            raise ModelFileError(f"{self.where}: {key} must be a number, got {value!r}.")
        return float(value)

    def positive(self, key: str, default: float) -> float:
        """A number above 0."""
        value = self.number(key, default)
        if value <= 0:
            raise ModelFileError(f"{self.where}: {key} must be above 0, got {value}.")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.source.get(key)
        if value is not None and not isinstance(value, bool):
            raise ModelFileError(f"{self.where}: {key} must be true or false, got {value!r}.")
        return default if value is None else value

    def mapping(self, key: str) -> Mapping[str, Any]:
        """An object; {} where absent."""
        value = self.source.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise ModelFileError(f"{self.where}: {key} must be an object, got {value!r}.")
        return value or {}

    def rope_layers(self, layers: int) -> list[int]:
        """For each layer, whether it rotates: ``no_rope_layers`` (0 = it does not) or every n-th does not."""
        every = self.integer("no_rope_layer_interval", 4)
        listed = self.source.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]
        if not isinstance(listed, list) or len(listed) != layers:
            raise ModelFileError(
                f"{self.where}: no_rope_layers must list 0 or 1 for each of {layers} layers."
            )
        return listed

    def heads(self, total: str, shared: str, default: int | None = None) -> tuple[int, int]:
        """(query heads, key heads), the second a divisor of the first."""
        queries = self.integer(total, most=MAX_HEADS)
        keys = self.integer(shared, default or queries, most=MAX_HEADS)
        if queries % keys:
            raise ModelFileError(f"{self.where}: {total} {queries} is no multiple of {shared} {keys}.")
        return queries, keys
