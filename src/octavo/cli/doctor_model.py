"""``octavo doctor model PATH``: what a model is made of, how it would run here, and whether its parts fit together."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module

from octavo import host
from octavo.api.chat.selftest import Finding, check_template, check_thinking, check_tokenizer, check_tools
from octavo.api.text.template import ChatTemplate
from octavo.api.text.tokenizer import load_tokenizer
from octavo.cli.flags import engine_options
from octavo.cli.progress import Reporter
from octavo.config import EngineOptions
from octavo.errors import OctavoError, UsageError
from octavo.files.base import ModelFiles
from octavo.host.implementation import architecture

MARKS = {"ok": " ", "note": "-", "wrong": "!"}


def run(args: argparse.Namespace) -> int:
    """Print what was found; the exit status is 1 where something is wrong."""
    if not args.model_tag:
        raise UsageError("No model was named.", "octavo doctor model PATH, like ./folder or smollm2:135m.")
    findings = list(examine(engine_options(args)))
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        width = max(len(finding.subject) for finding in findings)
        for finding in findings:
            print(f"{MARKS[finding.level]} {finding.subject:<{width}}  {finding.text}")
    wrong = sum(finding.level == "wrong" for finding in findings)
    if not args.json:
        print(f"{wrong} of {len(findings)} checks found something wrong." if wrong else "Nothing is wrong.")
    return 1 if wrong else 0


def examine(options: EngineOptions) -> Iterator[Finding]:
    """All checks, one after the other; a check that cannot be made is itself a finding."""
    model, reporter = options.model, Reporter()
    try:
        files = host.open_headers(options, reporter)
    except OctavoError as error:
        yield Finding("files", str(error), "wrong")
        return
    finally:
        reporter.close()
    yield Finding("files", f"{files.path} ({files.format}, {len(files.tensors)} tensors)")
    vocab_size = None
    try:
        arch = architecture(model, files)
        vocab_size = arch.vocab_size
        # Only now: it needs torch.
        yield from import_module("octavo.host.inspect").inspect_model(options, files, arch)
    except OctavoError as error:
        yield Finding("architecture", str(error), "wrong")
    yield from examine_text(options, files, vocab_size)
    files.close()


def examine_text(options: EngineOptions, files: ModelFiles, vocab_size: int | None) -> Iterator[Finding]:
    """Tokenizer and template."""
    if files.format != "gguf" and not files.path.exists() and options.model.tokenizer is None:
        yield Finding("tokenizer", "not looked at: its files are not here", "note")
        return
    try:
        tokenizer = load_tokenizer(files, options.model.tokenizer)
        yield from check_tokenizer(tokenizer, vocab_size or tokenizer.vocab_size)
        template = ChatTemplate(files.chat_template, tokenizer.special_tokens)
        yield from check_template(template, tokenizer)
        yield check_tools(template, tokenizer)
        yield check_thinking(template, tokenizer)
    except OctavoError as error:
        yield Finding("tokenizer", str(error), "wrong")
