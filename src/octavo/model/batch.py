"""The tensors of one step, as the layers see them; passed to ``forward``, never global (rule R3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class GroupTables:
    """Where one cache group's pages are: page_table [R, max_pages] int32, slot_mapping [T] int64 (-1 = no store)."""

    page_table: Tensor
    slot_mapping: Tensor


@dataclass
class Prompts:
    """A step's rows by kind, where the host knows them: ``singles`` [S] int64 have one query, ``longer`` [L] int64 more.

    ``num_queries`` and ``num_keys`` count those of the longer rows, ``num_pairs`` which query of them sees which key.
    """

    singles: Tensor
    longer: Tensor
    num_queries: int
    num_keys: int
    num_pairs: int


@dataclass
class Batch:
    """R rows with T tokens in all.

    token_ids, positions [T] int64; query_start [R + 1] int32; kv_lens [R] int32 (keys after this step);
    ``sample_at`` [S] int64 (or a slice): the tokens whose hidden states become logits; ``max_query`` and ``max_kv`` are host
    bounds. Padded captures have zero-length rows and -1 slots at the end. ``prompts`` is None where there are none or
    where a step is recorded, whose rows change; ``derived`` keeps what layers compute once a step.
    """

    token_ids: Tensor
    positions: Tensor
    query_start: Tensor
    kv_lens: Tensor
    groups: list[GroupTables]
    sample_at: Tensor | slice
    max_query: int
    max_kv: int
    prompts: Prompts | None = None
    derived: dict[str, Any] = field(default_factory=dict)
