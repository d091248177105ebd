"""Which steps are recorded as graphs: counts alone, so that a planner can ask too. No torch."""

from __future__ import annotations

# Tokens; matrix tiles are 128 rows, finer gains little. Larger steps keep even a small model's device busy for longer
# than the host takes to launch them one by one.
SIZES = (64, 128, 192, *range(256, 1537, 128))
MOST_ROWS = 256


def capture_sizes(limit: int) -> list[int]:
    """1, 2, 4, then multiples of 8 up to 256, of 32 up to 512 (vLLM's habit), cut at ``limit``."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(288, 513, 32)]
    kept = [size for size in sizes if size < limit]
    return [*kept, limit] if limit <= 512 else kept


def recorded_sizes(max_num_seqs: int, max_tokens: int) -> tuple[list[int], list[int]]:
    """Sizes of the mixed (tokens) and of the decode recordings (rows), ascending."""
    return [size for size in SIZES if size <= max_tokens], capture_sizes(max_num_seqs)


def rows_of(tokens: int, num_slots: int) -> int:
    """Rows that a mixed recording of so many tokens has room for."""
    return min(tokens, num_slots, MOST_ROWS)
