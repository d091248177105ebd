"""``python -m octavo.entrypoints.openai.api_server --model X``: the same server as ``octavo serve X``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from octavo.cli import main as octavo


def main(argv: Sequence[str] | None = None) -> int:
    """Serve with the flags of ``octavo serve``."""
    return octavo(["serve", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
