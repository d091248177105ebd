"""``octavo bench step`` measures what it says: counts, not times, are checked here."""

from __future__ import annotations

import json

import pytest

from octavo.bench import step


def test_rows_and_table() -> None:
    rows = step.run((1, 5), num_groups=2, overlap=False, rounds=1)
    assert [(row.num_seqs, row.num_groups) for row in rows] == [(1, 2), (5, 2)]
    assert all(row.engine_ms > 0 and row.null_runner_ms > 0 for row in rows)
    assert rows[1].per_sequence_us == pytest.approx(1000 * rows[1].engine_ms / 5)
    assert len(step.table(rows).splitlines()) == 3


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(["--num-seqs", "3", "--rounds", "1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["num_seqs"] for row in printed] == [3]
    assert step.main(["--num-seqs", "2", "--rounds", "1"]) == 0
    assert "engine ms/step" in capsys.readouterr().out
