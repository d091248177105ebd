"""docs/models.md says what the tests compare, no more and no less."""

from __future__ import annotations

from parity_table import PAGE, compared, split, table

REQUIRED = ("Prefill", "Paged decode", "Chunked", "Prefix hit", "Preempted", "TP 2", "GPU")


def test_the_page_is_up_to_date() -> None:
    assert split(PAGE.read_text())[1] == table(), "run: python tests/models/parity_table.py"


def test_every_family_is_compared_in_every_way() -> None:
    missing = {family: [c for c in REQUIRED if not counts[c]] for family, counts in compared().items()}
    assert {family: columns for family, columns in missing.items() if columns} == {}


def test_every_family_has_its_line_for_readers() -> None:
    page = "".join(split(PAGE.read_text())[::2])
    assert [family for family in compared() if f"`{family}`" not in page] == []
