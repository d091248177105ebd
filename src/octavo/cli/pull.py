"""``octavo pull NAME``: fetch a model into the cache and compile what its first start would, with a progress bar."""

from __future__ import annotations

import argparse
import sys

from octavo import host
from octavo.cli.progress import Reporter
from octavo.config import EngineOptions
from octavo.errors import UnsupportedModelError, UsageError
from octavo.files.resolve import is_cached, list_catalogue, pull


def run(args: argparse.Namespace) -> int:
    """Fetch the model and print where it lies; ``--list`` prints the catalogue."""
    if args.list:
        for entry in list_catalogue():
            here = "in the cache" if is_cached(entry, args.download_dir) else "not fetched"
            print(f"{entry.name:<16} {entry.nbytes / 1e6:8.1f} MB  {entry.licence:<14} {here}")
        return 0
    if not args.model_tag:
        raise UsageError("No model was named.", "octavo pull --list shows the catalogue.")
    reporter = Reporter()
    try:
        path = pull(args.model_tag, revision=args.revision, download_dir=args.download_dir, progress=reporter)
        options = EngineOptions.of(model=str(path))
        try:
            host.prepare(options, host.open_files(options), reporter)
        except UnsupportedModelError as error:  # fetched all the same: another version may run it
            print(f"octavo: {error}", file=sys.stderr)
    finally:
        reporter.close()
    print(path)
    return 0
