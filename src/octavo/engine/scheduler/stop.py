"""When a sequence ends by its tokens: eos, stop tokens, lengths (stop strings belong to the front half)."""

from __future__ import annotations

from octavo.engine.scheduler.sequence import Sequence
from octavo.protocol.generate import FinishReason


def append(seq: Sequence, drawn: list[int]) -> tuple[list[int], FinishReason | None, int | None]:
    """Add drawn tokens to the sequence up to its end.

    Returns the tokens added (a prefix of ``drawn``), why it ended (None: it goes on) and the token that stopped it.
    A stop token counts before ``max_tokens``: an eos drawn last is a "stop". Before ``min_tokens`` stop tokens do
    not end anything (the runner masks them; a runner that cannot must not end the request early either).
    """
    tokens, stop_ids = seq.tokens, seq.stop_ids
    for count, token in enumerate(drawn, 1):
        tokens.append(token)
        if token in stop_ids and len(tokens) > seq.min_len:
            return drawn[:count], "stop", token
        if len(tokens) >= seq.max_len:
            return drawn[:count], "length", None
    return drawn, None, None
