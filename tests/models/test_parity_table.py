"""docs/models.md says what the tests compare, no more and no less."""

from __future__ import annotations

from parity_table import PAGE, bfloat16, compared, split, table
from test_family_engine import family_of

REQUIRED = ("Prefill", "Paged decode", "Chunked", "Prefix hit", "Preempted", "TP 2", "GPU fp32")


def test_the_page_is_up_to_date() -> None:
    assert split(PAGE.read_text())[1] == table(), "run: python tests/models/parity_table.py"


def test_every_family_is_compared_in_every_way() -> None:
    missing = {family: [c for c in REQUIRED if not counts[c]] for family, counts in compared().items()}
    assert {family: columns for family, columns in missing.items() if columns} == {}


def test_the_run_on_a_gpu_covered_every_family_within_its_bounds() -> None:
    measured = bfloat16()
    assert [row for row, found in measured.items() if not found.is_near(family_of(row))] == []
    assert not measured or {family_of(row) for row in measured} == set(compared())


def test_every_family_has_its_line_for_readers() -> None:
    page = "".join(split(PAGE.read_text())[::2])
    assert [family for family in compared() if f"`{family}`" not in page] == []
