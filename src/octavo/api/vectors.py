"""What is done to texts before they become vectors, and to vectors and scores afterwards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from octavo.api.frontend import Frontend
from octavo.errors import RequestError
from octavo.protocol.control import Activation
from octavo.protocol.generate import SamplingParams

Vectors = NDArray[np.float32]
ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)


@dataclass(frozen=True)
class Cutting:
    """Which texts are cut: to ``most`` tokens (None: none is, -1: to what the model holds), from which side."""

    most: int | None = None
    side: str = "right"


def fitting(frontend: Frontend, ids: list[int], name: str, cutting: Cutting) -> list[int]:
    """The tokens of a text, cut as asked; ``RequestError`` where there are none or too many."""
    longest = frontend.max_model_len
    most = longest if cutting.most == -1 else cutting.most
    if most is not None and most > longest:
        raise RequestError(
            f"truncate_prompt_tokens is {most}, but the model holds {longest}.",
            param="truncate_prompt_tokens",
        )
    if most is not None and len(ids) > most:
        if cutting.side == "left":
            ids = ids[len(ids) - most :]
        else:  # the token that ends a text stays its last
            ends = frontend.tokenizer.special_ids
            ids = [*ids[: most - 1], ids[-1]] if ids[-1] in ends and most else ids[:most]
    if not ids:
        raise RequestError(f"{name} is empty: it has no tokens.", param=name)
    if len(ids) > longest:
        raise RequestError(
            f"{name} has {len(ids)} tokens, but the model holds {longest}.",
            param=name,
            cure="Shorten it, or send truncate_prompt_tokens: -1.",
        )
    return ids


def probabilities(made: Vectors, activation: Activation) -> Vectors:
    """The numbers of a head [N, labels] as probabilities; "identity" leaves them."""
    if activation == "identity":
        return made
    if activation == "sigmoid":
        half: Vectors = 0.5 * (1 + np.tanh(0.5 * made))  # of a large number exp would overflow
        return half
    powers = np.exp(made - made.max(axis=1, keepdims=True))
    shares: Vectors = powers / powers.sum(axis=1, keepdims=True)
    return shares


def shortened(made: Vectors, dimensions: int | None, *, normalize: bool) -> Vectors:
    """The first ``dimensions`` numbers of each vector, scaled again (Kusupati et al. 2022)."""
    if dimensions is None:
        return made
    if dimensions > made.shape[1]:
        raise RequestError(
            f"dimensions is {dimensions}, but the model's vectors have {made.shape[1]}.", param="dimensions"
        )
    return unit(made[:, :dimensions]) if normalize else made[:, :dimensions]


def unit(made: Vectors) -> Vectors:
    """Each vector scaled to length 1 (zeros stay)."""
    lengths = np.linalg.norm(made, axis=1, keepdims=True)
    scaled: Vectors = made / np.maximum(lengths, 1e-12)
    return scaled
