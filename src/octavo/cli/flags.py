"""Flags from option dataclasses: a field is a flag, its type the parser, its metadata the help."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from octavo.config import EngineOptions
from octavo.errors import UsageError

# Flags of other servers that people will try, and what to do instead.
REFUSED = {
    "--trust-remote-code": "Octavo never runs code from a model repository; leave it out.",
    "--disable-log-requests": "Requests are not logged anyway; leave it out.",
    "--swap-space": "There is no swap space: preempted requests are recomputed; leave it out.",
    "--enable-chunked-prefill": "Long prompts are always split over steps; leave it out.",
    "--use-v2-block-manager": "There is one page pool; leave it out.",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ``UsageError`` and that suggests the nearest known flag."""

    def error(self, message: str) -> NoReturn:
        """Turn argparse's own complaint into one sentence."""
        text = message[0].upper() + message[1:]
        raise UsageError(f"{text}.", f"See {self.prog} --help.")

    def short_usage(self) -> None:
        """Name only the positional arguments in the usage line; the flags are listed below it anyway."""
        words = []
        for action in self._actions:
            if not action.option_strings:
                name = str(action.metavar or action.dest.upper())
                words.append({"?": f"[{name}]", "*": f"[{name} ...]"}.get(str(action.nargs), name))
        self.usage = " ".join([self.prog.replace("%", "%%"), *words, "[flags]"])

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse everything; names may be written with underscores, anything unknown is a ``UsageError``."""
        # Intermixed: flags may stand between MODEL and PROMPT.
        args, rest = self.parse_known_intermixed_args([normalize(item) for item in argv])
        if rest:
            self._refuse(rest[0])
        return args

    def _refuse(self, item: str) -> NoReturn:
        name = item.partition("=")[0]
        if not name.startswith("-"):
            raise UsageError(f"Unexpected argument {item!r}.", f"See {self.prog} --help.")
        if name in REFUSED:
            raise UsageError(f"Unknown flag {name}.", REFUSED[name])
        near = difflib.get_close_matches(name, list(self._option_string_actions), n=1, cutoff=0.6)
        cure = f"Did you mean {near[0]}?" if near else f"See {self.prog} --help."
        raise UsageError(f"Unknown flag {name}.", cure)


def normalize(item: str) -> str:
    """``--max_model_len=8`` to ``--max-model-len=8``; values keep their underscores."""
    if not item.startswith("--"):
        return item
    name, separator, value = item.partition("=")
    return name.replace("_", "-") + separator + value


def add_options(
    parser: argparse.ArgumentParser, options: Any, title: str | None = None, skip: Sequence[str] = ()
) -> None:
    """Add a flag for every field of the dataclass ``options``; flags that are not given leave no attribute."""
    group = parser.add_argument_group(title) if title else parser
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if field.name not in skip:
            _add(group, field, hints[field.name])


def add_engine_options(parser: argparse.ArgumentParser, skip: Sequence[str] = ()) -> None:
    """Add the flags of every group of ``EngineOptions``."""
    for name, group in EngineOptions.groups().items():
        add_options(parser, group, name, skip)


def collect(args: argparse.Namespace, options: Any) -> Any:
    """The dataclass ``options`` from the flags that were given, its own defaults for the rest."""
    names = [field.name for field in dataclasses.fields(options)]
    values = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return options(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def collect_engine(args: argparse.Namespace) -> EngineOptions:
    """``EngineOptions`` from the flags that were given."""
    return EngineOptions(**{name: collect(args, group) for name, group in EngineOptions.groups().items()})


def engine_options(args: argparse.Namespace) -> EngineOptions:
    """Engine options with the model named by position or by ``--model``."""
    named = getattr(args, "model", None)
    if named and args.model_tag and named != args.model_tag:
        raise UsageError(f"Two models were named: {args.model_tag} and --model {named}.", "Name one.")
    if named or args.model_tag:
        args.model = named or args.model_tag
    return collect_engine(args)


def _add(group: Any, field: dataclasses.Field[Any], hint: Any) -> None:
    flags = ["--" + field.name.replace("_", "-")]
    if field.metadata.get("short"):
        flags.insert(0, field.metadata["short"])
    kind, many = _kind(hint)
    help_text = str(field.metadata.get("help", "")).replace("%", "%%")
    default = field.default
    if default not in (None, "", (), dataclasses.MISSING) and "default" not in help_text:
        help_text += f" [{default}]"
    if kind is bool:
        group.add_argument(
            *flags, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help_text
        )
        return
    group.add_argument(
        *flags,
        type=kind,
        action="append" if many else "store",
        choices=field.metadata.get("choices"),
        default=argparse.SUPPRESS,
        metavar=None if field.metadata.get("choices") else kind.__name__.upper(),
        help=help_text,
    )


def _kind(hint: Any) -> tuple[Any, bool]:
    """The scalar type of a field and whether it may be given several times; ``None`` in a union is dropped."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        return _kind(parts[0])
    if typing.get_origin(hint) in (tuple, list):
        return typing.get_args(hint)[0], True
    return hint, False
