"""``octavo chat``: a conversation with a model or with a running server."""

from __future__ import annotations

import argparse
import sys

from octavo.cli.talk import Message, Source, open_source, print_stream, timing
from octavo.errors import OctavoError

HELP = """/clear   forget the conversation
/help    this list
/exit    leave (so does Ctrl-D)
Ctrl-C stops an answer."""


def run(args: argparse.Namespace) -> int:
    """Converse until the end of input; with ``--quick`` one message only."""
    source = open_source(args)
    try:
        if args.quick:
            messages = [*_opening(args.system_prompt), {"role": "user", "content": args.quick}]
            answer = print_stream(lambda answer: source.chat(messages, answer))
            if args.verbose:
                print(timing(answer), file=sys.stderr)
            return 0
        return converse(source, args.system_prompt, args.verbose)
    finally:
        source.close()


def converse(source: Source, system_prompt: str | None, verbose: bool) -> int:
    """Read messages and commands, stream answers; an error ends one answer, not the conversation."""
    prompt = _line_prompt()
    messages: list[Message] = _opening(system_prompt)
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D leaves.")
            continue
        if not line:
            continue
        if line in ("/exit", "/quit", "/bye"):
            return 0
        if line == "/clear":
            messages = _opening(system_prompt)
            print("The conversation is forgotten.")
        elif line.startswith("/"):
            print(HELP if line in ("/help", "/?") else f"Unknown command {line}.\n{HELP}")
        else:
            _exchange(source, messages, line, verbose)


def _exchange(source: Source, messages: list[Message], line: str, verbose: bool) -> None:
    messages.append({"role": "user", "content": line})
    try:
        answer = print_stream(lambda answer: source.chat(messages, answer))
    except OctavoError as error:
        messages.pop()  # the question was not answered: the next one must not follow it
        print(f"octavo: {error}", file=sys.stderr)
        return
    messages.append({"role": "assistant", "content": answer.text})
    if verbose:
        print(timing(answer), file=sys.stderr)


def _opening(system_prompt: str | None) -> list[Message]:
    return [{"role": "system", "content": system_prompt}] if system_prompt else []


def _line_prompt() -> str:
    """The input prompt, and line editing where Python has it; nothing when input is piped."""
    if not sys.stdin.isatty():
        return ""
    try:
        import readline  # noqa: F401  (importing it is what gives ``input`` history and arrow keys)
    except ImportError:
        pass
    return ">>> "
