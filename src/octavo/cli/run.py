"""``octavo run MODEL "prompt"``: one question, the answer streams to standard output."""

from __future__ import annotations

import argparse
import os
import select
import stat
import sys
import time

from octavo.cli import chat
from octavo.cli.talk import Message, open_source, print_stream, timing
from octavo.errors import UsageError

EXIT_INTERRUPTED = 130
PATIENCE_S = 2.0


def run(args: argparse.Namespace) -> int:
    """Answer once; without a prompt, and with a person at the keyboard, converse instead."""
    prompt = " ".join(args.prompt)
    piped = read_piped()
    prompt = "\n\n".join(part for part in (prompt, piped) if part)
    if not prompt.strip():
        if args.raw or not sys.stdin.isatty():
            raise UsageError(
                "There is no prompt.", 'Write octavo run MODEL "your question", or pipe text in.'
            )
        args.url, args.quick = None, None
        return chat.run(args)
    began = time.perf_counter()
    source = open_source(args)
    loaded_s = time.perf_counter() - began
    try:
        if args.raw:
            answer = print_stream(lambda answer: source.complete(prompt, answer))
        else:
            messages: list[Message] = [{"role": "user", "content": prompt}]
            if args.system_prompt:
                messages.insert(0, {"role": "system", "content": args.system_prompt})
            answer = print_stream(lambda answer: source.chat(messages, answer))
    finally:
        source.close()
    if args.verbose:
        print(timing(answer, loaded_s), file=sys.stderr)
    return EXIT_INTERRUPTED if answer.finish_reason == "abort" else 0


def read_piped() -> str:
    """All of standard input where a pipe or a file stands there; "" for a terminal or /dev/null."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):  # closed, or replaced by something without a descriptor
        return ""
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
        return ""
    if os.name == "posix" and not select.select([sys.stdin], [], [], PATIENCE_S)[0]:
        # An inherited pipe that nobody writes to would otherwise look like a hang.
        print("Waiting for piped input; start with </dev/null where there is none.", file=sys.stderr)
    return sys.stdin.read().strip()
