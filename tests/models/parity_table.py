"""The table of what is compared for each family, made from the tests' own parameters.

python tests/models/parity_table.py            # rewrites the table in docs/models.md
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS / "models"), str(TESTS / "gpu")]

import bf16
import test_family_engine
import test_gguf_deepseek
import test_parity
import test_shard

from octavo.model.describe import ENCODERS, supported

PAGE = TESTS.parent / "docs" / "models.md"
BEGIN, END = (
    "<!-- parity table: made by tests/models/parity_table.py -->\n",
    "<!-- end of the parity table -->\n",
)
# A column and the tests whose parameters are the rows it holds for.
Test = Callable[..., None]
COLUMNS: dict[str, tuple[Test, ...]] = {
    "Prefill": (test_parity.test_logits,),
    "Paged decode": (test_parity.test_logits,),
    "Chunked": (test_parity.test_logits,),
    "Prefix hit": (test_family_engine.test_prefix_hits_and_preemption,),
    "Preempted": (test_family_engine.test_prefix_hits_and_preemption,),
    "TP 2": (test_shard.test_two_ranks_give_the_whole_logits,),
    "GGUF": (test_parity.test_gguf_logits, test_gguf_deepseek.test_logits),
}
GPU, BFLOAT16 = "GPU fp32", "GPU bf16"
GPU_TESTS = ("test_engine.py", "test_families.py")


def rows_of(test: Test) -> list[str]:
    """The rows that a test is run for: those of its parameter ``name``, which comes first."""
    marks: list[Any] = test.pytestmark  # type: ignore[attr-defined]
    named = [
        mark for mark in marks if mark.name == "parametrize" and "name" in (mark.args[0], mark.args[0][0])
    ]
    cases = [case for mark in named for case in mark.args[1]]
    return [case if isinstance(case, str) else case[0] for case in cases]


def gpu_families() -> set[str]:
    """Families whose tokens on a GPU are compared with the CPU's; read from the files, which need a GPU to run."""
    found: set[str] = set()
    for name in GPU_TESTS:
        for node in ast.walk(ast.parse((TESTS / "gpu" / name).read_text())):
            named = isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "FAMILIES"
            if named and isinstance(node.value, ast.Dict):
                found |= {
                    key.value.partition("-")[0] for key in node.value.keys if isinstance(key, ast.Constant)
                }
    return found


def bfloat16() -> dict[str, bf16.Distance]:
    """What the last run on a GPU measured, by row; it leaves the file that holds it."""
    if not bf16.RESULTS.exists():
        return {}
    found = json.loads(bf16.RESULTS.read_text())["families"]
    return {row: bf16.Distance(**values) for row, values in found.items()}


def compared() -> dict[str, dict[str, int]]:
    """Family -> column -> how many configurations are compared."""
    decoders = [family for family in supported() if family not in ENCODERS]
    found = {family: dict.fromkeys([*COLUMNS, GPU], 0) for family in decoders}
    for column, tests in COLUMNS.items():
        for row in [row for test in tests for row in rows_of(test)]:
            found[test_family_engine.family_of(row)][column] += 1
    for family in gpu_families():
        found[family][GPU] += 1
    return found


def table() -> str:
    """The table as Markdown; a number says how many configurations, and how far bfloat16 is where it was measured."""
    columns, measured = [*COLUMNS, GPU], bfloat16()
    heads = [*columns, BFLOAT16]
    lines = ["| model_type | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for family, counts in compared().items():
        off = [near.median for row, near in measured.items() if test_family_engine.family_of(row) == family]
        cells = [str(counts[column] or "") for column in columns]
        cells.append(f"{max(off):.1%}" if off else "")
        lines.append(f"| `{family}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def split(page: str) -> tuple[str, str, str]:
    """What stands before the table, the table, and what follows."""
    before, begin, rest = page.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} has no place for the parity table")
    return before + begin, inside, end + after


if __name__ == "__main__":
    first, _, last = split(PAGE.read_text())
    PAGE.write_text(first + table() + last)
