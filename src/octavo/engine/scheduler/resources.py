"""What a sequence needs to run, as resources that can say "not now" or "fewer".

Two phases: every resource admits (looks, changes nothing), then every resource reserves. The order of the list does
not matter. Whatever a resource has to tell the runner it adds to the plan at the end (``fill``).
"""

from __future__ import annotations

from typing import Protocol

from octavo.engine.cache.layout import CacheLayout
from octavo.engine.cache.pool import Pool
from octavo.engine.cache.prefix import PrefixIndex
from octavo.engine.cache.spec import StateKV
from octavo.engine.cache.table import PageTable
from octavo.engine.cache.watch import PageWatch
from octavo.engine.scheduler.sequence import Sequence
from octavo.protocol.plan import PageWrite, SlotInit, StepPlan, ZeroPage

# More tokens than any sequence has: "need not ask me again".
FOREVER = 1 << 62


class Resource(Protocol):
    """One thing that sequences share. A sequence with ``slot < 0`` in ``admit`` asks to be let in."""

    def prepare(self, seq: Sequence) -> None:
        """Before a waiting sequence asks: set ``num_computed`` = ``num_queued`` where work can be skipped."""

    def admit(self, seq: Sequence, n: int) -> int:
        """How many of the next ``n`` tokens may be queued now; 0 means not now. Changes nothing."""

    def reserve(self, seq: Sequence, n: int) -> int:
        """Take what the next ``n`` tokens need; returns how many (>= n) need no further question."""

    def confirm(self, seq: Sequence) -> int:
        """``num_computed`` has grown; returns the count from which on this must be called again."""

    def release(self, seq: Sequence) -> None:
        """Take everything back from a sequence that stops running."""

    def fill(self, plan: StepPlan) -> None:
        """Add what was reserved since the last call to the plan."""


class Slots:
    """The runner's persistent rows; a sequence holds one while it runs."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots - 1, -1, -1))
        self._admitted: list[Sequence] = []

    def prepare(self, seq: Sequence) -> None:
        """See ``Resource.prepare``: a slot skips no work."""

    def admit(self, seq: Sequence, n: int) -> int:
        """See ``Resource.admit``."""
        return n if seq.slot >= 0 or self._free else 0

    def reserve(self, seq: Sequence, n: int) -> int:
        """See ``Resource.reserve``."""
        if seq.slot < 0:
            seq.slot = self._free.pop()
            self._admitted.append(seq)
        return FOREVER

    def confirm(self, seq: Sequence) -> int:
        """See ``Resource.confirm``."""
        return FOREVER

    def release(self, seq: Sequence) -> None:
        """See ``Resource.release``."""
        self._free.append(seq.slot)
        seq.slot = -1

    def fill(self, plan: StepPlan) -> None:
        """See ``Resource.fill``."""
        for seq in self._admitted:
            if seq.slot < 0:  # let in and preempted in the same call
                continue
            plan.admits.append(
                SlotInit(
                    slot=seq.slot,
                    token_ids=seq.tokens[:],
                    num_prompt=seq.num_prompt,
                    sampling=seq.sampling,
                    seed=seq.seed,
                    stop_token_ids=sorted(seq.stop_ids),
                    pooling=seq.pooling,
                    second_at=seq.second_at,
                )
            )
        self._admitted.clear()


class Pages:
    """The page pool, its prefix index and the sequences' tables as one resource.

    A page enters the index when the step that filled it was collected, not when it was queued. Steps run in order
    on the device, so queued would be readable too; but tokens of a decode row are unknown until then, drafts may be
    rejected, and a row may fail (NaN) after others had already shared its pages. The price is one step of delay.
    """

    def __init__(
        self,
        layout: CacheLayout,
        num_pages: int,
        *,
        root_key: bytes,
        prefix_caching: bool,
        watch: PageWatch | None = None,
    ) -> None:
        self.layout = layout
        self.index = PrefixIndex(layout, root_key)
        self.pool = Pool(num_pages, self.index.forget, watch)
        self.prefix_caching = prefix_caching and bool(layout.groups)
        self.num_queries = 0
        self.num_hits = 0
        specs = [group.spec for group in layout.groups]
        # Confirmed counts at which a page may fill or fall behind: multiples of the smallest page.
        self._stride = min((spec.page_size for spec in specs), default=FOREVER)
        # A page of recurrent state is a checkpoint at its end: no row may run over it.
        self._checkpoints = [spec.page_size for spec in specs if isinstance(spec, StateKV)]
        self._states = [group for group, spec in enumerate(specs) if isinstance(spec, StateKV)]
        self._writes: list[tuple[Sequence, int, int, list[int]]] = []
        self._zeros: list[ZeroPage] = []

    def table(self) -> PageTable:
        """An empty page table for a new sequence."""
        return PageTable(self.layout)

    def prepare(self, seq: Sequence) -> None:
        """Find the longest cached prefix; the last token is always computed, because its logits are wanted."""
        seq.num_computed = seq.num_queued = 0
        if not self.prefix_caching:
            return
        if seq.chain is None:
            seq.chain = self.index.chain(seq.tokens, seq.cache_salt)
        if not seq.needs_every_position:
            hit, seq.table.hit = self.index.longest(seq.chain, len(seq.tokens) - 1)
            seq.num_computed = seq.num_queued = hit

    def admit(self, seq: Sequence, n: int) -> int:
        """Fewer tokens where pages are short; a waiting sequence only if all its known tokens fit.

        Letting a long prompt in with the few pages that happen to be free would only preempt it again.
        """
        for size in self._checkpoints:
            n = min(n, size - seq.num_queued % size)
        table, free = seq.table, self.pool.num_free
        if seq.slot < 0:
            found = [page for pages in table.hit for page in pages]
            free -= sum(not self.pool.is_held(page) for page in found)
            if self.layout.pages_for(len(seq.tokens)) - len(found) > free:
                return 0
        elif table.missing(seq.num_computed, seq.num_queued + n) > free:
            self.confirm(seq)  # drop what fell behind since the last look
            free = self.pool.num_free
        else:
            return n
        low, high = 0, n
        while low < high:
            middle = (low + high + 1) // 2
            if table.missing(seq.num_computed, seq.num_queued + middle) <= free:
                low = middle
            else:
                high = middle - 1
        return low

    def reserve(self, seq: Sequence, n: int) -> int:
        """See ``Resource.reserve``."""
        table = seq.table
        if not table.open:
            self._adopt(seq)
        for group, first, pages in table.extend(seq.num_computed, seq.num_queued + n, self.pool):
            self._writes.append((seq, group, first, pages))
            if first == 0 and group in self._states:  # a new state, not a checkpoint that was found
                self._zeros.append(ZeroPage(pages[0]))
        return table.lease(seq.num_queued) if table.groups else FOREVER

    def confirm(self, seq: Sequence) -> int:
        """Index pages that are full now, drop those that no later token can see."""
        computed = seq.num_computed
        seq.table.commit(computed, self.pool, self.index, seq.chain)
        return (computed // self._stride + 1) * self._stride

    def release(self, seq: Sequence) -> None:
        """See ``Resource.release``; what a failed sequence computed is not to be trusted."""
        if seq.failed:
            for page in seq.table.pages():
                if self.index.holds(page):
                    self.index.forget(page)
                    self.pool.unindex(page)
        seq.table.release(self.pool)

    def fill(self, plan: StepPlan) -> None:
        """See ``Resource.fill``; a sequence preempted after it reserved has lost those pages again."""
        for seq, group, first, pages in self._writes:
            if seq.slot >= 0:
                plan.page_writes.append(PageWrite(group, seq.slot, first, pages))
        plan.page_ops.extend(self._zeros)
        self._writes.clear()
        self._zeros.clear()

    def forget_unused(self) -> None:
        """Empty the prefix index but for pages that sequences hold."""
        for page in self.index.pages():
            if not self.pool.is_held(page):
                self.index.forget(page)
                self.pool.unindex(page)

    def _adopt(self, seq: Sequence) -> None:
        """A sequence is let in: share the prefix that ``prepare`` found."""
        hit = seq.num_computed
        if self.prefix_caching:
            self.num_queries += len(seq.tokens)
            self.num_hits += hit
        shared = [list(pages) for pages in seq.table.hit]
        seq.table.adopt(hit, self.pool)
        for group, (held, pages) in enumerate(zip(seq.table.groups, shared)):
            if pages:
                self._writes.append((seq, group, held.first, pages))
