"""What cached keys and values are divided by before they are rounded to 8 bits: 1, or what a checkpoint was calibrated to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from octavo.model.layers.build import CacheType
from octavo.model.layers.load import LoadItem, Source, StoredMatrix


class CacheScales:
    """One number for a layer's keys, one for its values; numbers of the host, known once the model is loaded."""

    def __init__(self, module: str, cache_type: CacheType) -> None:
        """``module`` is the attention's name in files, with the layer's prefix."""
        self.key = self.value = 1.0
        self.module = module
        self.used = cache_type.dtype is not None
        self.calibrated = cache_type.calibrated

    def items(self) -> list[LoadItem]:
        """What the loader may find: by the names of vLLM and compressed-tensors, and those of ModelOpt. Scales of queries and
        probabilities belong to kernels that round those too."""
        if not self.calibrated:
            return []
        names = [
            ("key", f"{self.module}.k_scale"),
            ("value", f"{self.module}.v_scale"),
            ("key", f"{self.module}.k_proj.k_scale"),
            ("value", f"{self.module}.v_proj.v_scale"),
            ("key", f"{self.module}.k_proj.output_scale"),
            ("value", f"{self.module}.v_proj.output_scale"),
            ("query", f"{self.module}.q_scale"),
            ("probability", f"{self.module}.prob_scale"),
        ]
        sources = tuple(Source(key, name, required=False) for key, name in names)
        shape = torch.empty(2, device="meta")
        return [StoredMatrix(f"{self.module}.k_scale", "", shape, sources=sources, take=self.take)]

    def take(self, stored: Mapping[str, Tensor]) -> None:
        """Keep them where the cache has 8 bits."""
        if self.used:
            self.key = float(stored["key"].float().max()) if "key" in stored else 1.0
            self.value = float(stored["value"].float().max()) if "value" in stored else 1.0


def calibrated(names: Mapping[str, object]) -> bool:
    """Whether a checkpoint's tensors hold such scales."""
    return any(name.endswith((".k_scale", ".v_scale", ".output_scale")) for name in names)
