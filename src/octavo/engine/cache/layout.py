"""From the layers' cache kinds to groups that share a page table, over one pool of equal-sized pages.

Layers of the same kind are dealt into groups of equal length. A page of the pool is a slice of ``len(group)``
tensors, one per position in the group, and every group uses the same tensors:

    Gemma3, 6 layers: L L L L L G   (L = window, G = full)       tensor 0
    groups: [L0] [L1] [L2] [L3] [L4] [G5]                        page 17 -> belongs to one group of one sequence
    more layers: 10 L + 2 G -> groups of 2: [L0 L1] [L2 L3] ... [G5 G11], tensors 0 and 1

A group of 16 tokens and a group of 32 tokens can share the pool if their pages have the same bytes; ``plan_layout``
gives the kind with fewer bytes a token a larger page size, so that pages come out equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm

from octavo.engine.cache.spec import KVSpec, LayerKV, StateKV, ceil_div, kinds_of, with_page_size


@dataclass(frozen=True)
class CacheGroup:
    """Layers (model layer indices) that share one page table and one cache kind.

    Of a layer that keeps several kinds, ``parts`` says which one this is, counted from 0 (() = every layer's first).
    """

    spec: KVSpec
    layers: tuple[int, ...]
    parts: tuple[int, ...] = ()

    def members(self) -> list[tuple[int, int]]:
        """(layer, part) by position in the group."""
        return list(zip(self.layers, self.parts or (0,) * len(self.layers)))


@dataclass(frozen=True)
class CacheLayout:
    """All groups, and the tensors beneath them.

    ``layers_per_group`` tensors exist, each of ``num_pages * page_bytes``; the layer at position j of any group
    lives in tensor j. ``pool_page_bytes`` is what one page costs in all tensors together.
    """

    groups: tuple[CacheGroup, ...]
    page_bytes: int
    layers_per_group: int

    @property
    def pool_page_bytes(self) -> int:
        """Device bytes of one page id, over all tensors."""
        return self.page_bytes * self.layers_per_group

    def place(self, layer: int) -> tuple[int, int]:
        """(group index, tensor index) of a model layer."""
        for index, group in enumerate(self.groups):
            if layer in group.layers:
                return index, group.layers.index(layer)
        raise KeyError(layer)

    def num_pages(self, cache_bytes: int) -> int:
        """How many pages fit into that many bytes."""
        return cache_bytes // self.pool_page_bytes

    def pages_for(self, num_tokens: int, step_tokens: int = 1) -> int:
        """Most pages one sequence ever holds on its way to ``num_tokens``, growing ``step_tokens`` at a time."""
        return sum(group.spec.peak(num_tokens, step_tokens) for group in self.groups)

    def part(self, layers: range) -> CacheLayout:
        """The same groups with only these layers in them: what one stage of a pipeline holds."""
        groups = tuple(
            _group(group.spec, [member for member in group.members() if member[0] in layers])
            for group in self.groups
        )
        longest = max((len(group.layers) for group in groups), default=0)
        return CacheLayout(groups, self.page_bytes, max(1, longest) if groups else 0)


MAX_GROUPS = 20
MAX_EMPTY = 0.05  # places of groups without a layer, as a share of all layers


def _group(spec: KVSpec, members: list[tuple[int, int]]) -> CacheGroup:
    """A group of (layer, part)."""
    parts = tuple(part for _, part in members)
    return CacheGroup(spec, tuple(layer for layer, _ in members), parts if any(parts) else ())


def plan_layout(specs: Mapping[int, LayerKV]) -> CacheLayout:
    """Deal layers into groups with equal page bytes.

    ``specs`` maps layer index to its kind or kinds (layers without a cache are absent). The group length divides the count of
    the rarest kind, so that kind (usually full attention, the one that grows) wastes nothing: the longest that leaves
    few places empty in the other kinds' last groups, or else the one that leaves fewest. A longer one is taken only
    where there would be more than ``MAX_GROUPS`` page tables.
    """
    if not specs:
        return CacheLayout((), 0, 0)
    kept = {
        (layer, part): spec for layer in sorted(specs) for part, spec in enumerate(kinds_of(specs[layer]))
    }
    largest = max(spec.page_bytes for spec in kept.values())
    others = {_equalize(spec, largest).page_size for spec in kept.values() if not isinstance(spec, StateKV)}
    step = lcm(*others)
    by_kind: dict[KVSpec, list[tuple[int, int]]] = {}
    for member, spec in kept.items():
        by_kind.setdefault(_aligned(_equalize(spec, largest), step), []).append(member)
    size = _group_length([len(members) for members in by_kind.values()])
    groups = []
    for spec, members in by_kind.items():
        for start in range(0, len(members), size):
            groups.append(_group(spec, members[start : start + size]))
    return CacheLayout(tuple(groups), largest, size)


def _group_length(counts: list[int]) -> int:
    """Layers in a group, for kinds of so many layers; see ``plan_layout``."""
    most = max(MAX_GROUPS, len(counts))

    def groups(size: int) -> int:
        return sum(ceil_div(count, size) for count in counts)

    def empty(size: int) -> int:
        return groups(size) * size - sum(counts)

    rarest = min(counts)
    lengths = [size for size in range(rarest, 0, -1) if rarest % size == 0 and groups(size) <= most]
    if not lengths:
        return next(size for size in range(rarest, max(counts) + 1) if groups(size) <= most)
    few = [size for size in lengths if empty(size) <= MAX_EMPTY * sum(counts)]
    return few[0] if few else min(lengths, key=empty)


def _equalize(spec: KVSpec, page_bytes: int) -> KVSpec:
    """The spec with as many tokens a page as fit ``page_bytes``; a state page is padded instead."""
    if isinstance(spec, StateKV):
        return spec
    return with_page_size(spec, spec.page_size * (page_bytes // spec.page_bytes))


def _aligned(spec: KVSpec, step: int) -> KVSpec:
    """A state's checkpoints where the pages of all other kinds end too: a prefix can be found only there."""
    if not isinstance(spec, StateKV):
        return spec
    return with_page_size(spec, max(step, spec.page_size // step * step))
