"""One tensor the loader must fill, and how."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class LoadItem:
    """``target`` is a view into a parameter; ``hf`` and ``gguf`` name its source.

    ``heads`` > 0: GGUF may store the rows with rotary pairs interleaved. ``offset`` is added to Hugging Face norm
    weights (GGUF stores the sum). ``constant`` is what a random model gets instead of noise.
    """

    hf: str
    gguf: str
    target: Tensor
    heads: int = 0
    offset: float = 0.0
    constant: float | None = None
