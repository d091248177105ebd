"""What ``run``, ``chat`` and ``complete`` share: a source of answers (a loaded model or a server), streamed to the terminal."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from octavo.cli.flags import engine_options
from octavo.errors import OctavoError, UsageError

SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_tokens",
    "stop",
)
Message = dict[str, str]


@dataclass
class Answer:
    """A streamed answer and its figures; times in seconds."""

    text: str = ""
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    finish_reason: str | None = None
    first_token_s: float = 0.0
    total_s: float = 0.0


class Source(Protocol):
    """Where answers come from; both streams yield text and fill in ``answer``."""

    def chat(self, messages: Sequence[Message], answer: Answer) -> Generator[str, None, None]:
        """Answer a conversation."""

    def complete(self, prompt: str, answer: Answer) -> Generator[str, None, None]:
        """Continue a text."""

    def close(self) -> None:
        """Free what it holds."""


class RemoteSource:
    """A running server."""

    def __init__(self, server: Any, model: str, sampling: dict[str, Any]) -> None:
        self.server = server
        self.model = model
        self.sampling = sampling

    def chat(self, messages: Sequence[Message], answer: Answer) -> Generator[str, None, None]:
        """See ``Source``."""
        for choice in self._events("chat/completions", {"messages": list(messages)}, answer):
            yield (choice.get("delta") or {}).get("content") or ""

    def complete(self, prompt: str, answer: Answer) -> Generator[str, None, None]:
        """See ``Source``."""
        for choice in self._events("completions", {"prompt": prompt}, answer):
            yield choice.get("text") or ""

    def _events(
        self, endpoint: str, body: dict[str, Any], answer: Answer
    ) -> Generator[dict[str, Any], None, None]:
        with closing(self.server.stream(endpoint, {"model": self.model, **body, **self.sampling})) as events:
            for event in events:
                usage = event.get("usage") or {}
                answer.num_prompt_tokens = usage.get("prompt_tokens") or answer.num_prompt_tokens
                answer.num_tokens = usage.get("completion_tokens") or answer.num_tokens
                for choice in event.get("choices") or []:
                    answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
                    yield choice

    def close(self) -> None:
        """Nothing is held between answers."""


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling flags that were given."""
    return {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}


def open_source(args: argparse.Namespace) -> Source:
    """The server of ``--url``, or the model, loaded with a progress bar."""
    sampling = sampling_of(args)
    if getattr(args, "url", None):
        if args.model_tag:
            raise UsageError(f"Both a model ({args.model_tag}) and --url were given.", "Give one of them.")
        # The HTTP client takes longer to import than the engine's loop: only where it is needed.
        server = import_module("octavo.cli.remote").RemoteServer(args.url, args.api_key)
        names = [args.model_name] if args.model_name else server.models()
        if not names:
            raise OctavoError(f"{args.url} serves no model.")
        return RemoteSource(server, names[0], sampling)
    if not args.model_tag:
        raise UsageError("No model was named.", "Name one, like smollm2:135m, or give --url of a server.")
    # Loaded only now: talking to a server must not cost the import of torch.
    local: Source = import_module("octavo.cli.local").open_local(engine_options(args), sampling)
    return local


def print_stream(start: Callable[[Answer], Generator[str, None, None]]) -> Answer:
    """Write an answer to standard output as it comes; Ctrl-C ends it where it is (``finish_reason`` "abort").

    A source that may not be interrupted anywhere holds Ctrl-C back itself and ends its stream.
    """
    answer = Answer()
    began = time.perf_counter()
    with closing(start(answer)) as pieces:
        try:
            for text in pieces:
                if not text:
                    continue
                if not answer.text:
                    answer.first_token_s = time.perf_counter() - began
                answer.text += text
                sys.stdout.write(text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            answer.finish_reason = "abort"
    answer.total_s = time.perf_counter() - began
    if answer.text and not answer.text.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()
    return answer


def timing(answer: Answer, loaded_s: float | None = None) -> str:
    """One line of figures for ``--verbose``."""
    decode_s = answer.total_s - answer.first_token_s
    rate = (answer.num_tokens - 1) / decode_s if decode_s > 0 and answer.num_tokens > 1 else 0.0
    start = f"ready in {loaded_s:.2f} s; " if loaded_s is not None else ""
    return (
        f"{start}{answer.num_prompt_tokens} prompt tokens, first text after {answer.first_token_s:.3f} s; "
        f"{answer.num_tokens} tokens in {answer.total_s:.2f} s ({rate:.1f} tokens/s); "
        f"finish: {answer.finish_reason}"
    )
