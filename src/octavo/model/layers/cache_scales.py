"""What cached keys and values are divided by before they are rounded to 8 bits: 1, or what a checkpoint was calibrated to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from octavo.errors import ModelFileError
from octavo.model.blocks import Attention
from octavo.model.layers.build import Build
from octavo.model.layers.load import LoadItem, Source, StoredMatrix

KEY, VALUE = 0, 1


class CacheScales:
    """Numbers of a layer's key heads on the device, [2, Hkv] float32: of keys, of values; None where all are 1."""

    def __init__(self, module: str, block: Attention, build: Build) -> None:
        """``module`` is the attention's name in files, with the layer's prefix."""
        self.module = module
        self.calibrated = build.cache_type.calibrated
        self.factors: Tensor | None = None
        if self.calibrated and build.cache_type.dtype is not None:
            self.factors = build.empty(2, block.num_kv_heads, dtype=torch.float32).fill_(1.0)
        copies = block.qkv.parts[1].copies if len(block.qkv.parts) > 1 else 1
        self.first_head = build.ranks.rank // copies * block.num_kv_heads
        self.all_heads = build.ranks.size * block.num_kv_heads // copies

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
        """Keep them where the cache has 8 bits: one for all heads, or this rank's of one for each."""
        if self.factors is None:
            return
        for place, name in ((KEY, "key"), (VALUE, "value")):
            if name not in stored:
                continue
            found = stored[name].float().reshape(-1)
            if found.numel() not in (1, self.all_heads) or not bool((found.isfinite() & (found > 0)).all()):
                raise ModelFileError(
                    f"{self.module}: the scales of cached {name}s are {found.numel()} numbers for {self.all_heads} heads, "
                    "or not all above 0.",
                    "Leave --kv-cache-dtype out, or use files whose scales belong to this model.",
                )
            own = slice(self.first_head, self.first_head + self.factors.shape[1])
            self.factors[place] = found if found.numel() == 1 else found[own]


def calibrated(names: Mapping[str, object]) -> bool:
    """Whether a checkpoint's tensors hold such scales."""
    return any(name.endswith((".k_scale", ".v_scale", ".output_scale")) for name in names)
