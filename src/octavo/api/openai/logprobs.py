"""Log probabilities in the three shapes of the dialect: chat, completions, prompt."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.api.openai.schema import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from octavo.api.text.tokenizer import Tokenizer
from octavo.protocol.generate import Logprob

LOWEST = -9999.0  # JSON has no -inf


class TokenNames:
    """Text and bytes of single tokens; with ``as_ids`` the text is ``token_id:N``."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool) -> None:
        self.tokenizer = tokenizer
        self.as_ids = as_ids

    def text(self, token_id: int) -> str:
        """The token as text; half characters become the replacement character."""
        if self.as_ids:
            return f"token_id:{token_id}"
        return self.tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    def bytes(self, token_id: int) -> list[int]:
        """The token as UTF-8 bytes, also where it is half a character."""
        return list(self.tokenizer.token_bytes(token_id))


def chat_logprobs(names: TokenNames, rows: Sequence[Sequence[Logprob]], num_top: int) -> ChatLogprobs:
    """``rows``: for each drawn token itself, then the likeliest ones."""
    content = []
    for row in rows:
        drawn, top = row[0], row[1 : 1 + num_top]
        content.append(
            TokenLogprob(
                names.text(drawn.token_id),
                max(drawn.logprob, LOWEST),
                names.bytes(drawn.token_id),
                [
                    TopLogprob(names.text(t.token_id), max(t.logprob, LOWEST), names.bytes(t.token_id))
                    for t in top
                ],
            )
        )
    return ChatLogprobs(content)


def completion_logprobs(
    names: TokenNames,
    token_ids: Sequence[int],
    rows: Sequence[Sequence[Logprob] | None],
    num_top: int,
    offset: int,
) -> tuple[CompletionLogprobs, int]:
    """The parallel lists, and the offset for the next tokens; a row of None (the first prompt token) gives None."""
    reply = CompletionLogprobs([], [], [], [])
    for token_id, row in zip(token_ids, rows):
        text = names.text(token_id)
        reply.tokens.append(text)
        reply.text_offset.append(offset)
        offset += len(text)
        if row is None:
            reply.token_logprobs.append(None)
            reply.top_logprobs.append(None)
            continue
        reply.token_logprobs.append(max(row[0].logprob, LOWEST))
        if num_top:
            top = {names.text(t.token_id): max(t.logprob, LOWEST) for t in row[: 1 + num_top]}
            reply.top_logprobs.append(top)
        else:
            reply.top_logprobs.append(None)
    return reply, offset


def prompt_logprobs(names: TokenNames, rows: Sequence[Sequence[Logprob]], num_top: int) -> PromptLogprobs:
    """One entry a prompt token, None for the first, which nothing precedes."""
    reply: PromptLogprobs = [None]
    for row in rows:
        reply.append(
            {
                t.token_id: PromptLogprob(max(t.logprob, LOWEST), t.rank, names.text(t.token_id))
                for t in row[: 1 + num_top]
            }
        )
    return reply
