"""Octavo: LLM inference and serving.

Public names load lazily: ``import octavo`` takes milliseconds and imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.config import EngineOptions as EngineOptions
    from octavo.llm import LLM as LLM
    from octavo.protocol.generate import BeamSearchParams as BeamSearchParams
    from octavo.protocol.generate import PoolingParams as PoolingParams
    from octavo.protocol.generate import SamplingParams as SamplingParams
    from octavo.protocol.generate import StructuredOutputsParams as StructuredOutputsParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "BeamSearchParams",
    "EngineOptions",
    "PoolingParams",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]

_HOMES = {
    "LLM": "octavo.llm",
    "EngineOptions": "octavo.config",
    "BeamSearchParams": "octavo.protocol.generate",
    "PoolingParams": "octavo.protocol.generate",
    "SamplingParams": "octavo.protocol.generate",
    "StructuredOutputsParams": "octavo.protocol.generate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
