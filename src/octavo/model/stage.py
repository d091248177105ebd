"""Pipeline parallelism as a change of description: the layers of one of ``count`` stages. No torch.

stage 0   embedding, layers 0..k     ──hidden states──>     stage 1   layers k+1..n, norm, head
"""

from __future__ import annotations

from dataclasses import replace

from octavo.errors import UnsupportedModelError
from octavo.model.blocks import DecoderSpec


def cut(spec: DecoderSpec, stage: int, count: int) -> DecoderSpec:
    """What stage ``stage`` computes; earlier stages take one layer more where they do not divide.

    Names that belong to other stages become names that are of no use here. Raises ``UnsupportedModelError`` where there
    are fewer layers than stages.
    """
    if count == 1:
        return spec
    layers = len(spec.layers)
    if layers < count:
        raise UnsupportedModelError(
            f"{layers} layers cannot be split into {count} stages.",
            "Choose a smaller --pipeline-parallel-size.",
        )
    base, more = divmod(layers, count)
    first = stage * base + min(stage, more)
    mine = range(first, first + base + (1 if stage < more else 0))
    is_first, is_last = stage == 0, stage == count - 1
    elsewhere = [
        prefix.format(i)
        for i in range(layers)
        if i not in mine
        for prefix in (spec.hf_layer_prefix, spec.gguf_layer_prefix)
    ]
    outside = []
    if not is_first and not (is_last and spec.head is None):
        outside += [(spec.embedding.hf, spec.embedding.gguf)]
    if not is_first and spec.positions is not None:
        outside += [(spec.positions.hf, spec.positions.gguf)]
    if not is_last:
        outside += [(spec.norm.hf, spec.norm.gguf)]
        outside += [(part.hf, part.gguf) for part in (spec.head.parts if spec.head is not None else ())]
    joins = [spec.streams] if spec.streams is not None and not is_last else []
    return replace(
        spec,
        layers=spec.layers[mine.start : mine.stop],
        head=spec.head if is_last else None,
        ignored_prefixes=(
            *spec.ignored_prefixes,
            *elsewhere,
            *(f"{name}." for names in outside for name in names if name),
            *(part.hf for join in joins for part in (join.fn, join.base, join.scale)),
        ),
        first_layer=first,
        is_first=is_first,
        is_last=is_last,
    )
