"""Whether an engine generates or pools, and how it pools: decided from options, the architecture and the files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from octavo.config import ModelOptions
from octavo.errors import UsageError
from octavo.files.base import ModelFiles
from octavo.files.pooler import PoolerAdvice, read_pooler
from octavo.model.arch import ArchConfig
from octavo.model.classes import has_classes
from octavo.model.describe import is_encoder
from octavo.protocol.generate import Pooling


class PoolerConfig(msgspec.Struct, forbid_unknown_fields=True):
    """``--pooler-config``; ``use_activation`` is another name of ``normalize``."""

    pooling_type: Literal["LAST", "MEAN", "CLS", "last", "mean", "cls"] | None = None
    normalize: bool | None = None
    use_activation: bool | None = None


@dataclass(frozen=True)
class Pooler:
    """``pools``: the engine is there for vectors alone. The rest is the default of every request."""

    pools: bool
    pooling: Pooling
    normalize: bool


def choose_pooler(model: ModelOptions, files: ModelFiles, arch: ArchConfig) -> Pooler:
    """Encoders always pool; others with --runner pooling. The flag goes before the files, and those before the custom."""
    encoder = is_encoder(arch)
    if model.runner == "generate" and encoder:
        raise UsageError(f"{model.model} is an encoder: it cannot generate.", "Use --runner pooling.")
    if model.runner == "generate" and has_classes(arch):
        raise UsageError(f"{model.model} tells classes apart: it cannot generate.", "Use --runner pooling.")
    pools = encoder or model.runner == "pooling" or has_classes(arch)
    if pools and not encoder and not has_classes(arch) and model.convert == "none":
        raise UsageError(
            f"{model.model} is a generative model: it pools only when it is converted.",
            "Use --convert embed.",
        )
    given = _given(model.pooler_config)
    advice = read_pooler(files.path) if pools else PoolerAdvice()
    named = (given.pooling_type or advice.pooling or ("cls" if encoder else "last")).lower()
    pooling = msgspec.convert(named, Pooling)
    normalize = given.use_activation if given.normalize is None else given.normalize
    if normalize is None:
        normalize = True if advice.normalize is None else advice.normalize
    return Pooler(pools, pooling, normalize)


def _given(text: str | None) -> PoolerConfig:
    if text is None:
        return PoolerConfig()
    try:
        return msgspec.json.decode(text, type=PoolerConfig)
    except msgspec.DecodeError as error:
        raise UsageError(
            f"--pooler-config is not usable: {error}.",
            'Write it like {"pooling_type": "MEAN", "normalize": true}.',
        ) from None
