"""``octavo complete``: continue text, without a chat template."""

from __future__ import annotations

import argparse
import sys

from octavo.cli.talk import Source, open_source, print_stream, timing


def run(args: argparse.Namespace) -> int:
    """Complete the text of ``--quick``, or every line of input until its end."""
    source = open_source(args)
    try:
        if args.quick:
            _complete(source, args.quick, args.verbose)
            return 0
        prompt = "> " if sys.stdin.isatty() else ""
        while True:
            try:
                line = input(prompt)
            except EOFError:
                return 0
            if line:
                _complete(source, line, args.verbose)
    finally:
        source.close()


def _complete(source: Source, text: str, verbose: bool) -> None:
    answer = print_stream(lambda answer: source.complete(text, answer))
    if verbose:
        print(timing(answer), file=sys.stderr)
