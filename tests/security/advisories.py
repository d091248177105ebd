"""The advisories of the field, and the page that says what became of each: ``python tests/security/advisories.py``.

A test belongs to a row by its name: ``test_43_cve_2026_7482_...``. The command runs all of them and writes
``docs/security.md`` with their verdicts and the number of inputs that the fuzz tests tried.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "security.md"
TEST = re.compile(r"test_(\d+b?)_\w+")


@dataclass(frozen=True)
class Row:
    """One advisory or family of them; ``absent`` says why no test is needed, ``also`` names tests elsewhere."""

    number: str
    ids: str
    hole: str
    absent: str = ""
    also: str = ""


ROWS = [
    Row("01", "CVE-2026-48746", "the key check used the URL rebuilt from the Host header"),
    Row("02", "vLLM's open routes", "the key guarded /v1 only"),
    Row("03", "CVE-2025-59425", "the key was compared byte by byte"),
    Row("04", "CVE-2024-9052, -9053, -11041", "pickle on RPC and message queues"),
    Row("05", "CVE-2025-29783, -32444, -47277, -30165", "pickle from the network between machines"),
    Row("06", "CVE-2025-30202", "a socket bound on all interfaces"),
    Row(
        "07",
        "CVE-2025-24357, GHSA-ggpf-24jw-3fcw",
        "torch.load of weights",
        also="tests/files/test_folder.py",
    ),
    Row("08", "CVE-2025-62164, CVE-2026-56340", "prompt embeddings through torch.load"),
    Row("09", "CVE-2025-62372, CVE-2026-55514", "wrong shapes of media or embeddings kill the engine"),
    Row(
        "10",
        "CVE-2025-66448, CVE-2026-22807",
        "auto_map code run without consent",
        also="tests/files/test_folder.py",
    ),
    Row("11", "CVE-2026-27893, CVE-2026-4944", "trust_remote_code=True hard-coded"),
    Row("12", "CVE-2026-90553", "a processor loader that ignored the flag"),
    Row("13", "GHSA-h3rc-6mm3-gc2m", "a request field picked remote code"),
    Row(
        "14", "CVE-2026-41523", "a security check written as an assertion", also="tests/test_architecture.py"
    ),
    Row("15", "CVE-2025-6242, CVE-2026-24779", "requests forged through media URLs"),
    Row("16", "CVE-2026-33626", "the same in LMDeploy"),
    Row("17", "CVE-2026-0599", "links in plain text were fetched"),
    Row("18", "CVE-2026-22778", "an error told a heap address"),
    Row("19", "CVE-2026-54236", "the same on other routers"),
    Row(
        "20",
        "CVE-2026-22773",
        "images of ambiguous shape",
        absent="no image inputs; row 09 tests that they are refused",
    ),
    Row(
        "21",
        "vLLM PR 44970",
        "a compressed sound expands without bound",
        absent="no audio inputs, no decoder",
    ),
    Row("22", "CVE-2024-8768", "an empty prompt crashes the server"),
    Row("23", "CVE-2026-34756", "n without a bound"),
    Row(
        "24", "CVE-2025-48956", "a huge header eats the memory", also="tests/server/test_server_bad_input.py"
    ),
    Row(
        "25",
        "CVE-2025-48942, -48943, -48944",
        "a bad schema, expression or tool kills the engine",
        also="tests/engine/test_structured_fuzz.py",
    ),
    Row("25b", "CVE-2025-9141", "eval on the arguments of a tool call"),
    Row("26", "CVE-2026-55574", "expressions compiled without a limit"),
    Row(
        "27",
        "CVE-2025-48887, GHSA-j828-28rj-hfhp, CVE-2025-46560",
        "quadratic parsers",
        also="tests/server/test_tools_parse.py",
    ),
    Row(
        "28",
        "CVE-2025-61620, CVE-2025-62426",
        "loops in templates of requests",
        also="tests/server/test_text_template.py",
    ),
    Row("29", "CVE-2026-54234", "an invalid draft kills the engine"),
    Row("30", "CVE-2026-93592", "token ids below zero or above the vocabulary"),
    Row(
        "31",
        "vLLM's cluster of 2026",
        "a request field reaches the device unchecked",
        also="tests/server/test_server_fuzz.py",
    ),
    Row("32", "CVE-2025-25183, CVE-2025-46722", "predictable hashes of the prefix cache"),
    Row(
        "33",
        "CVE-2025-46570",
        "timing tells what another tenant has cached",
        also="tests/server/test_keys.py",
    ),
    Row("34", "CVE-2025-29770", "a grammar cache fills the disk"),
    Row("35", "CVE-2026-3059, -3060, -3989", "pickle on brokers and replay scripts"),
    Row(
        "36",
        "CVE-2026-5760",
        "a GGUF's chat template rendered without a sandbox",
        also="tests/server/test_text_template.py",
    ),
    Row("37", "CVE-2026-7304", "code of a request unpickled"),
    Row("38", "CVE-2026-15976", "weights loaded by a request", also="tests/server/test_keys.py"),
    Row(
        "39",
        "CVE-2025-10164, GHSA-h74r-pwx2-6qr2",
        "an unpickler with a deny-list",
        absent="there is no unpickler: row 04",
    ),
    Row(
        "40",
        "CVE-2026-46432, CVE-2026-7669",
        "trust_remote_code flipped in a fallback",
        absent="there is no such flag: rows 10 and 11",
    ),
    Row("41", "CVE-2024-37032", "a digest used as a path", also="tests/files/test_fetch.py"),
    Row(
        "42",
        "CVE-2024-45436, CVE-2025-44779, CVE-2026-7020",
        "names that leave their folder",
        also="tests/files/test_fetch.py",
    ),
    Row("43", "CVE-2026-7482", "GGUF offsets beyond the file", also="tests/files/test_gguf.py"),
    Row(
        "44",
        "CVE-2024-39720, CVE-2024-12055, CVE-2025-0312, -0315, -0317, CVE-2024-8063, CVE-2025-1975",
        "GGUF: bounds, huge allocations, division by zero",
        also="tests/files/test_gguf.py",
    ),
    Row("45", "CVE-2024-12886", "compressed data without a bound", also="tests/files/test_fetch.py"),
    Row("46", "CVE-2024-28224, CVE-2025-63389, CVE-2025-51471", "rebound names, open management"),
    Row("47", "CVE-2026-42248, CVE-2026-42249", "a tampered updater"),
    Row("48", "CVE-2026-21869", "a negative number from JSON", also="tests/server/test_server_fuzz.py"),
    Row(
        "49",
        "CVE-2025-53630, CVE-2026-27940, CVE-2024-21802",
        "sums of sizes that overflow",
        also="tests/files/test_folder.py",
    ),
    Row(
        "50",
        "llama.cpp's RPC server",
        "an open tensor RPC",
        absent="there is no such listener: rows 06 and 35",
    ),
    Row("51", "CVE-2024-34359", "a chat template that runs code", absent="the same test as row 36"),
    Row(
        "52",
        "CVE-2026-75104, CVE-2026-69112",
        "shard names that escape or name a pipe",
        also="tests/files/test_folder.py",
    ),
    Row("53", "CVE-2026-4372, CVE-2026-5241", "a key of config.json fetches and runs code"),
]


def tests() -> dict[str, list[str]]:
    """Row number to the tests that carry it in their names, as ``file.py::name``."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(HERE.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (match := TEST.fullmatch(node.name)):
                found[match[1]].append(f"{path.name}::{node.name}")
    return found


def run() -> tuple[dict[str, str], int]:
    """Verdict of every test by ``file.py::name``, and how many inputs were tried."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", f"--junitxml={report}", str(HERE)]
        command += ["--ignore", str(HERE / "test_advisories.py")]  # looks at the page that is being made
        subprocess.run([*command, "-o", "junit_family=xunit1"], check=False)
        verdicts: dict[str, str] = {}
        inputs = 0
        for case in ET.parse(report).getroot().iter("testcase"):  # written by pytest a moment ago
            name = f"{str(case.get('classname')).rsplit('.', 1)[-1]}.py::{str(case.get('name')).partition('[')[0]}"
            bad = any(case.find(kind) is not None for kind in ("failure", "error"))
            if bad or verdicts.get(name) != "fails":
                verdicts[name] = (
                    "fails" if bad else "skipped" if case.find("skipped") is not None else "passes"
                )
            inputs += sum(
                int(str(p.get("value"))) for p in case.iter("property") if p.get("name") == "inputs"
            )
    return verdicts, inputs


def page(verdicts: dict[str, str], inputs: int) -> str:
    """The whole page."""
    found = tests()
    lines = [
        "# Security: every advisory of the field, and its test",
        "",
        "Each row is a hole that some serving engine had. Where it could exist here, a test in `tests/security` carries the row's",
        "number in its name; `python tests/security/advisories.py` runs them all and writes this page.",
        "",
        f"Last run: {len(verdicts)} tests, {sum(v == 'fails' for v in verdicts.values())} failures; {inputs:,} inputs tried by the fuzz tests; the engine never died.",
        "",
        "| row | advisory | the hole | tests | verdict |",
        "|---|---|---|---|---|",
    ]
    for row in ROWS:
        mine = found.get(row.number, [])
        results = {verdicts.get(name, "not run") for name in mine}
        verdict = "not applicable: " + row.absent if row.absent else " and ".join(sorted(results))
        shown = "<br>".join(f"`{name.partition('::')[2]}`" for name in mine)
        if row.also:
            shown = "<br>".join(part for part in (shown, f"and in `{row.also}`") if part)
        lines.append(f"| {row.number} | {row.ids} | {row.hole} | {shown} | {verdict} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(*run()))
