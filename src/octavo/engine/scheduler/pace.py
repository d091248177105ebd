"""How many tokens a step may hold so that answers keep flowing while prompts are computed.

A step's time grows with its tokens: seconds = base + tokens / rate. ``Pace`` learns both from the steps themselves
(large steps teach the rate, small ones the base) and turns a time target into a token budget:

    seconds
      |              x   large steps: rate
      |         x
      | x x x            small steps: base
      +-------------------- tokens
                ^ budget where base + tokens / rate = target
"""

from __future__ import annotations

SMOOTH = 0.2  # weight of a new observation
SMALL, LARGE = 0.125, 0.5  # of the present budget: what counts as a small and as a large step
LEAST = 64  # tokens: below this prompts would starve


class Pace:
    """Learns from ``observe`` and answers with ``budget``; the first answer is ``most``."""

    __slots__ = ("base_s", "most", "per_token_s", "target_s")

    def __init__(self, target_s: float, most: int) -> None:
        """``target_s`` 0 = no limit; ``most`` tokens is the hard bound of a step."""
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

    def budget(self) -> int:
        """Tokens of a step that would take about the target."""
        if self.target_s <= 0 or self.per_token_s <= 0:
            return self.most
        return max(
            min(LEAST, self.most), min(self.most, int((self.target_s - self.base_s) / self.per_token_s))
        )
