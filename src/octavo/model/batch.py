"""The tensors of one step, as the layers see them; passed to ``forward``, never global (rule R3)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class GroupTables:
    """Where one cache group's pages are: page_table [R, max_pages] int32, slot_mapping [T] int64 (-1 = no store)."""

    page_table: Tensor
    slot_mapping: Tensor


@dataclass
class Batch:
    """R rows with T tokens in all.

    token_ids, positions [T] int64; query_start [R + 1] int32; kv_lens [R] int32 (keys after this step);
    ``sample_at`` [S] int64: the tokens whose hidden states become logits; ``max_query`` and ``max_kv`` are host
    bounds. Padded captures have zero-length rows and -1 slots at the end.
    """

    token_ids: Tensor
    positions: Tensor
    query_start: Tensor
    kv_lens: Tensor
    groups: list[GroupTables]
    sample_at: Tensor
    max_query: int
    max_kv: int
