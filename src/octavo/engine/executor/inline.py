"""The executor without a process in between: drives one runner right here."""

from __future__ import annotations

from octavo.engine.cache.layout import CacheLayout
from octavo.engine.executor.base import Runner


class InlineExecutor:
    """Passes every call to its runner."""

    def __init__(self, runner: Runner) -> None:
        self.layout: CacheLayout = runner.layout
        self.num_pages = runner.num_pages
        self.num_slots = runner.num_slots
        # Bound once: a step makes three calls, and there is nothing to add to them.
        self.forward = runner.forward
        self.sample = runner.sample
        self.collect = runner.collect
        self.close = runner.close

    def watch(self) -> None:
        """See ``Executor.watch``: who asks is who computes."""
