"""How many tokens a step may hold so that answers keep flowing while prompts are computed.

A step's time grows with its tokens: seconds = base + tokens / rate. ``Pace`` learns both from the steps themselves
(large steps teach the rate, small ones the base) and turns a time target into a token budget:

    seconds
      |              x   large steps: rate
      |         x
      | x x x            small steps: base
      +-------------------- tokens
                ^ budget where base + tokens / rate = target

That is the bound of any step. Within it a step takes only its share of the prompts that wait, so that they are spread
over the steps in which answers go on anyway. A step that decodes waits for the weights to be read; the first few hundred
tokens beside it cost almost nothing, while a step full of prompts makes every answer wait:

    share = max(free, waiting tokens / horizon)        horizon = HORIZON steps, fewer beyond FEW answers

``free`` is what the host measured to be the cheapest (``host/rhythm.py``): about 256 tokens for a model whose steps wait
for its weights, more for a small one, whose steps wait for the launches of its kernels.

Under steady load that settles where as much is computed as arrives, so many steps later; a burst gets larger steps, up to
the bound. The more answers go on, the less of a step is free beside them, and a prompt that waits keeps a row empty all
the while: they are spread less. Prompts that end in different steps also keep their answers from ending together, and
the next prompts from arriving together.
"""

from __future__ import annotations

SMOOTH = 0.2  # weight of a new observation
SMALL, LARGE = 0.125, 0.5  # of the present budget: what counts as a small and as a large step
LEAST = 64  # tokens: below this prompts would starve
HORIZON = 16  # steps over which waiting prompts are spread
ALMOST_FREE = 256  # tokens, where nothing is measured: about where a step stops waiting for memory
FEW = 32  # answers beside which prompts are spread over the whole horizon
ROUND = 128  # tokens: rows of a matrix tile, and the grain of recorded steps


class Pace:
    """Learns from ``observe`` and answers with ``budget``; the first answer is ``most``."""

    __slots__ = ("base_s", "free", "most", "per_token_s", "target_s")

    def __init__(self, target_s: float, most: int, free: int = ALMOST_FREE) -> None:
        """``target_s`` 0 = no limit; ``most`` tokens is the hard bound of a step; ``free`` prompt tokens are taken at once."""
        self.free = free
        self.target_s = target_s
        self.most = most
        self.base_s = 0.0
        self.per_token_s = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """A step of that many tokens took that long."""
        if self.target_s <= 0 or tokens <= 0 or seconds <= 0:
            return
        now = self.budget()
        if tokens >= LARGE * now:
            cost = max(seconds - self.base_s, 0.5 * seconds) / tokens
            known = self.per_token_s or cost
            # A step that is far slower than known is believed at once; a faster one little by little.
            self.per_token_s = cost if cost > 2 * known else known + SMOOTH * (cost - known)
        elif tokens <= SMALL * now:
            self.base_s += SMOOTH * (min(seconds, self.target_s / 2) - self.base_s)

    def prompts(self, answers: int, waiting: int) -> int:
        """Prompt tokens of a step in which answers have so many rows, while so many prompt tokens wait."""
        most = self.budget()
        if answers == 0 or self.target_s <= 0:
            return most
        share = waiting * max(FEW, answers) // (HORIZON * FEW)
        whole = (answers + max(self.free, share)) // ROUND * ROUND
        return max(min(most, whole) - answers, LEAST)

    def budget(self) -> int:
        """Tokens of a step that would take about the target."""
        if self.target_s <= 0 or self.per_token_s <= 0:
            return self.most
        return max(
            min(LEAST, self.most), min(self.most, int((self.target_s - self.base_s) / self.per_token_s))
        )
