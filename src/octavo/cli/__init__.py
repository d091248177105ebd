"""``octavo``: finds the command, parses its flags, runs it, and says in one sentence what went wrong."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module

from octavo import __version__
from octavo.cli.commands import COMMANDS, parser_of
from octavo.errors import OctavoError, UsageError

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 (failed), 2 (usage), 130 (interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        return dispatch(arguments)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left (``octavo ... | head``); keep the interpreter from flushing into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except OctavoError as error:
        if debug:
            traceback.print_exc()
        print(f"octavo: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR
    except Exception as error:  # noqa: BLE001  (the last line of defence: no traceback for a user)
        if debug:
            traceback.print_exc()
        message = f"octavo: internal error: {type(error).__name__}: {error}"
        print(f"{message} (a bug; --debug shows where)", file=sys.stderr)
        return EXIT_ERROR


def dispatch(arguments: list[str]) -> int:
    """Find the command in ``arguments`` and call it."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("-v", "--version", "version"):
        print(f"octavo {__version__}")
        return 0
    name, rest = split(arguments)
    if name not in COMMANDS:
        if name == "bench" and (not rest or rest[0] in ("-h", "--help")):
            print(overview("bench "))
            return 0
        raise UsageError(*unknown(name, rest))
    command = COMMANDS[name]
    if command.passes_rest:
        result = _load(command.target)([item for item in rest if item != "--debug"])
        return result or 0
    try:
        args = parser_of(name).parse(rest)
    except SystemExit as leave:  # --help has been printed
        return int(leave.code or 0)
    return _load(command.target)(args) or 0


def split(arguments: list[str]) -> tuple[str, list[str]]:
    """The command's name (one or two words) and what follows it."""
    if " ".join(arguments[:2]) in COMMANDS:
        return " ".join(arguments[:2]), arguments[2:]
    if arguments[0] == "bench" and len(arguments) > 1 and not arguments[1].startswith("-"):
        return f"bench {arguments[1]}", arguments[2:]
    return arguments[0], arguments[1:]


def overview(prefix: str = "") -> str:
    """The list of commands that begin with ``prefix``."""
    rows = [(name, command.help) for name, command in COMMANDS.items() if name.startswith(prefix)]
    width = max(len(name) for name, _ in rows)
    lines = [f"usage: octavo {prefix}COMMAND ...", "", "LLM inference and serving.", ""]
    lines += [f"  {name:<{width}}  {text}" for name, text in rows]
    lines += ["", "octavo COMMAND --help lists a command's flags; octavo --version prints the version."]
    return "\n".join(lines)


def unknown(name: str, rest: list[str]) -> tuple[str, str]:
    """Cause and cure for a command that does not exist."""
    near = difflib.get_close_matches(name, list(COMMANDS), n=1, cutoff=0.5)
    cure = f"Did you mean octavo {near[0]}?" if near else "octavo --help lists the commands."
    return f"Unknown command {name!r}.", cure


def _load(target: str) -> Callable[..., int | None]:
    module, _, function = target.partition(":")
    found: Callable[..., int | None] = getattr(import_module(module), function)
    return found
