"""Answers of a model loaded in this process; the only part of ``run``, ``chat`` and ``complete`` that needs torch."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

from octavo.cli.progress import Reporter
from octavo.cli.talk import Answer, Message
from octavo.config import EngineOptions
from octavo.llm import LLM, Prompt, deferred_interrupt


class LocalSource:
    """A loaded model as a ``talk.Source``."""

    def __init__(self, llm: LLM, sampling: dict[str, Any]) -> None:
        self.llm = llm
        self.sampling = sampling

    def chat(self, messages: Sequence[Message], answer: Answer) -> Generator[str, None, None]:
        """Answer a conversation."""
        return self._stream(self.llm.chat_prompt(messages), answer)

    def complete(self, prompt: str, answer: Answer) -> Generator[str, None, None]:
        """Continue a text."""
        return self._stream(prompt, answer)

    def close(self) -> None:
        """Free the device."""
        self.llm.close()

    def _stream(self, prompt: Prompt, answer: Answer) -> Generator[str, None, None]:
        sampling = self.llm.frontend.default_sampling(**self.sampling)
        with deferred_interrupt() as interrupted, closing(self.llm.stream(prompt, sampling)) as pieces:
            for piece in pieces:
                answer.num_tokens += piece.num_tokens
                if piece.output is not None:
                    answer.num_prompt_tokens = len(piece.output.prompt_token_ids)
                    answer.finish_reason = piece.output.outputs[0].finish_reason
                yield piece.text
                if interrupted():
                    answer.finish_reason = "abort"
                    return


def open_local(options: EngineOptions, sampling: dict[str, Any]) -> LocalSource:
    """Load the model, with its progress on standard error."""
    reporter = Reporter()
    try:
        return LocalSource(LLM(options.for_people(), progress=reporter), sampling)
    finally:
        reporter.close()
