"""Which kernels of other packages were measured to be right and faster than ours, on which card and with which versions.

``octavo doctor --measure`` records, starts read. A record counts only for the card and the versions that it was made with.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import tempfile
from pathlib import Path

import msgspec

from octavo import __version__
from octavo.errors import UsageError

PACKAGES = ("torch", "triton", "flash-attn-3", "flash_attn_3")
WRONG = 0.01  # relative error beyond that of bfloat16
GAIN = 0.97  # of our time: what is nearly as fast is not worth another package


class Timing(msgspec.Struct):
    """One shape of step: microseconds of the vendor's and of ours, and the vendor's error against the reference body."""

    shape: str
    us: float
    ours_us: float
    error: float


class Finding(msgspec.Struct):
    """What was measured of one implementation; ``problem`` is why it could not be."""

    op: str
    implementation: str
    timings: list[Timing] = []
    problem: str = ""

    @property
    def is_better(self) -> bool:
        """Right at every shape, slower than ours at none, and faster in all."""
        rows = self.timings
        if self.problem or not rows or any(not row.error <= WRONG or row.us > row.ours_us for row in rows):
            return False
        return sum(row.us for row in rows) < GAIN * sum(row.ours_us for row in rows)


class Record(msgspec.Struct):
    """Everything measured at a time."""

    versions: dict[str, str]
    findings: list[Finding]


def versions() -> dict[str, str]:
    """What a measurement depends on besides the card."""
    found = {"octavo": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def record_path(card: str) -> Path:
    """The file of a card's record."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return Path(base).expanduser() / "octavo" / "measurements" / f"{name}.json"


def proven(card: str) -> frozenset[tuple[str, str]]:
    """(op, implementation) that the card's record speaks for; a record that is damaged or of other versions is none."""
    try:
        record = msgspec.json.decode(record_path(card).read_bytes(), type=Record)
    except (OSError, msgspec.DecodeError):
        return frozenset()
    if record.versions != versions():
        return frozenset()
    return frozenset((found.op, found.implementation) for found in record.findings if found.is_better)


def keep(card: str, findings: list[Finding]) -> Path:
    """Write a card's record; ``UsageError`` where that is impossible."""
    path = record_path(card)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(msgspec.json.format(msgspec.json.encode(Record(versions(), findings)), indent=1))
        os.replace(file.name, path)
    except OSError as error:
        raise UsageError(
            f"The measurement cannot be kept in {path.parent}: {error.strerror}.", "Set XDG_CACHE_HOME."
        ) from None
    return path
