"""When a sequence ends by its tokens: eos, stop tokens, lengths (stop strings belong to the front half)."""

from __future__ import annotations

from octavo.engine.scheduler.sequence import Sequence
from octavo.protocol.generate import FinishReason, RepetitionDetectionParams


def append(seq: Sequence, drawn: list[int]) -> tuple[list[int], FinishReason | None, int | None]:
    """Add drawn tokens to the sequence up to its end.

    Returns the tokens added (a prefix of ``drawn``), why it ended (None: it goes on) and the token that stopped it.
    A stop token counts before ``max_tokens``: an eos drawn last is a "stop". Before ``min_tokens`` stop tokens do
    not end anything (the runner masks them; a runner that cannot must not end the request early either).
    """
    tokens, stop_ids, repetition = seq.tokens, seq.stop_ids, seq.sampling.repetition_detection
    for count, token in enumerate(drawn, 1):
        tokens.append(token)
        if token in stop_ids and len(tokens) > seq.min_len:
            return drawn[:count], "stop", token
        if len(tokens) >= seq.max_len:
            return drawn[:count], "length", None
        if (
            repetition is not None
            and len(tokens) > seq.min_len
            and repeats(tokens, seq.num_prompt, repetition)
        ):
            return drawn[:count], "repetition", None
    return drawn, None, None


def repeats(tokens: list[int], begin: int, asked: RepetitionDetectionParams) -> bool:
    """Whether the tokens from ``begin`` on end with a pattern so many times in a row."""
    count = len(tokens)
    for size in range(max(1, asked.min_pattern_size), asked.max_pattern_size + 1):
        rest = size * (asked.min_count - 1)
        if count - begin < rest + size:
            return False
        if (
            tokens[-1] == tokens[-1 - size]
            and tokens[count - rest :] == tokens[count - rest - size : count - size]
        ):
            return True
    return False
