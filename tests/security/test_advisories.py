"""The table of advisories is whole: every row has its test or its reason, every test its row, and the page shows both."""

from __future__ import annotations

import advisories


def test_every_row_has_a_test_or_a_reason() -> None:
    found = advisories.tests()
    numbers = [row.number for row in advisories.ROWS]
    assert numbers == sorted(set(numbers)) and len(numbers) == 54
    for row in advisories.ROWS:
        assert bool(row.absent) != bool(found.get(row.number) or row.also), row
    assert set(found) <= set(numbers)


def test_every_file_that_is_named_exists() -> None:
    for row in advisories.ROWS:
        if row.also:
            text = (advisories.HERE.parents[1] / row.also).read_text()
            assert "def test_" in text, row
            ids = [name.lower().replace("-", "_") for name in row.ids.split(", ") if name.startswith("CVE")]
            named = any(name in text.lower() for name in ids)
            assert named or advisories.tests().get(row.number), row


def test_the_page_is_up_to_date() -> None:
    page = advisories.PAGE.read_text()
    for row in advisories.ROWS:
        assert f"| {row.number} | {row.ids} |" in page
    for names in advisories.tests().values():
        for name in names:
            assert f"`{name.partition('::')[2]}`" in page, name
    assert "fails" not in page and "not run" not in page
