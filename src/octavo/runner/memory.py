"""How many cache pages fit: measured, never guessed, so that no step can exceed the memory.

GPU  total x utilization │ weights │ peak of the largest step │ graphs │ cache pages ... │ left alone (1 - utilization)
CPU  pages for every sequence at full length, but at most a share of the free memory
"""

from __future__ import annotations

from dataclasses import dataclass

from octavo.config import CacheOptions
from octavo.engine.cache.layout import CacheLayout
from octavo.errors import OutOfMemoryError

GIB = 1 << 30
CPU_SHARE = 0.4  # of the free memory; the rest is the user's machine


@dataclass(frozen=True)
class MemoryPlan:
    """The decision and what it was made from (bytes)."""

    num_pages: int
    max_model_len: int
    cache_bytes: int
    free_bytes: int
    peak_bytes: int
    reserved_bytes: int


def plan_pages(
    layout: CacheLayout,
    options: CacheOptions,
    *,
    kind: str,
    free_bytes: int,
    total_bytes: int,
    peak_bytes: int,
    graph_bytes: int = 0,
    max_model_len: int,
    length_is_fixed: bool,
    max_num_seqs: int,
    step_tokens: int,
) -> MemoryPlan:
    """Pages for the cache after weights are loaded, and the largest step and the graphs were measured.

    Shortens ``max_model_len`` to what fits unless the user fixed it; raises ``OutOfMemoryError`` with the numbers
    and the cure where not even that (or 1 page) fits.
    """
    most = layout.pages_for(max_model_len, step_tokens) * max_num_seqs + 1
    reserved = 0
    if options.num_gpu_blocks_override is not None:
        pages = options.num_gpu_blocks_override
    elif options.kv_cache_memory_bytes is not None:
        pages = layout.num_pages(options.kv_cache_memory_bytes)
    elif kind == "cpu":
        reserved = int(free_bytes * (1 - CPU_SHARE))
        pages = min(most, layout.num_pages(free_bytes - reserved))
    else:
        reserved = int(total_bytes * (1 - options.gpu_memory_utilization)) + graph_bytes
        pages = layout.num_pages(max(0, free_bytes - reserved - peak_bytes))
    if layout.page_bytes == 0:
        pages = 1
    fitting = max_model_len
    if layout.pages_for(max_model_len, step_tokens) > pages:
        fitting = _longest(layout, pages, step_tokens, max_model_len)
        if length_is_fixed or fitting < 1:
            need = layout.pages_for(max_model_len, step_tokens) * layout.pool_page_bytes
            cure = f"Use --max-model-len {fitting}" if fitting >= 1 else "Use a smaller model"
            more = " or raise --gpu-memory-utilization." if kind != "cpu" else " or free memory."
            raise OutOfMemoryError(
                f"The KV cache for one sequence of {max_model_len} tokens needs {need / GIB:.2f} GiB, but "
                f"{pages * layout.pool_page_bytes / GIB:.2f} GiB are left for it.",
                cure + more,
            )
    return MemoryPlan(pages, fitting, pages * layout.pool_page_bytes, free_bytes, peak_bytes, reserved)


def _longest(layout: CacheLayout, pages: int, step_tokens: int, limit: int) -> int:
    """Most tokens of one sequence that ``pages`` can hold (pages_for grows with length, so bisect)."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if layout.pages_for(middle, step_tokens) <= pages:
            low = middle
        else:
            high = middle - 1
    return low
