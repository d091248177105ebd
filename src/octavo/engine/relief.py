"""An executor that takes over from another while the engine runs: what is slow to prepare need not keep people waiting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from octavo.engine.executor.base import Executor
from octavo.engine.settings import EngineSettings


@dataclass(frozen=True)
class Successor:
    """An executor with the same layout, pages and slots as the one it follows, and what to say of it."""

    executor: Executor
    settings: EngineSettings


class Relief(Protocol):
    """Somebody who prepares a successor."""

    @property
    def ready(self) -> bool:
        """Whether the successor may be taken."""

    def take(self) -> Successor:
        """The successor, once."""

    def close(self) -> None:
        """Give up preparing."""
