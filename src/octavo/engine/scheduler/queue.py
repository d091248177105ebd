"""The waiting line, whose order is the policy.

    fcfs       (number of arrival,)
    priority   (priority, arrival time, number of arrival)      lower runs first
    fair       the tenant that was served least, then (number of arrival,)

A preempted sequence goes back with the key it had, hence before everybody who came later.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from itertools import islice

from octavo.engine.scheduler.sequence import Sequence
from octavo.errors import UsageError
from octavo.protocol.generate import GenerateRequest

POLICIES = ("fcfs", "priority", "fair")
MAX_IDLE_TENANTS = 4096
CREDIT = 8192  # tokens / weight that a tenant may have saved up when it comes back
LATELY = 1 << 17  # tokens charged to all: a tenant that left no longer ago is expected back
NUM_EXPECTED = 8  # of those, the latest that are looked at


def order_key(policy: str, request: GenerateRequest, number: int) -> tuple[float, ...]:
    """The sort key of a request that was the ``number``-th to arrive; keys of one policy are all different."""
    if policy in ("fcfs", "fair"):
        return (number,)
    if policy == "priority":
        return (request.priority, request.arrival_s, number)
    raise UsageError(f"Unknown scheduling policy {policy!r}.", f"Use one of {', '.join(POLICIES)}.")


def make_queue(policy: str) -> Queue:
    """The waiting line of a policy."""
    return FairQueue() if policy == "fair" else Queue()


class Queue:
    """Sequences by key; removal from the middle is lazy (the entry is skipped when it comes up)."""

    __slots__ = ("_heap", "_present", "num_tokens")
    charges = False  # whether ``charge`` wants to hear of every row, and the order depends on it

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, ...], Sequence]] = []
        self._present: dict[int, Sequence] = {}
        self.num_tokens = 0  # of all waiting sequences, as long as they were when they were pushed

    def __len__(self) -> int:
        return len(self._present)

    def __iter__(self) -> Iterator[Sequence]:
        """All waiting sequences, in no particular order."""
        return iter(list(self._present.values()))

    def push(self, seq: Sequence) -> None:
        """Put a sequence in line."""
        heapq.heappush(self._heap, (seq.key, seq))
        self._present[seq.id] = seq
        seq.num_in_line = len(seq.tokens)
        self.num_tokens += seq.num_in_line

    def peek(self) -> Sequence | None:
        """Who is next (None: nobody waits)."""
        heap, present = self._heap, self._present
        while heap:
            seq = heap[0][1]
            if present.get(seq.id) is seq:
                return seq
            heapq.heappop(heap)
        return None

    def pop(self) -> Sequence:
        """Take the next one out; somebody must wait."""
        seq = self.peek()
        if seq is None:
            raise IndexError("pop from an empty queue")
        heapq.heappop(self._heap)
        self._forget(seq)
        return seq

    def take(self, seq: Sequence) -> None:
        """Take out a sequence that runs from now on; usually, but not surely, the next one."""
        if self.peek() is seq:
            self.pop()
        else:
            self.remove(seq)

    def remove(self, seq: Sequence) -> None:
        """Take a waiting sequence out of the line."""
        self._forget(seq)
        if len(self._heap) > 64 and len(self._heap) > 4 * len(self._present):
            # Many were aborted: do not let their entries pile up behind a long-waiting head.
            self._heap = [(other.key, other) for other in self._present.values()]
            heapq.heapify(self._heap)

    def _forget(self, seq: Sequence) -> None:
        del self._present[seq.id]
        self.num_tokens -= seq.num_in_line

    # -- what a policy may say about those who run; the plain line says nothing ----------------------------------

    def charge(self, seq: Sequence, tokens: int) -> None:
        """A running sequence was given a row of ``tokens``."""

    def leave(self, seq: Sequence) -> None:
        """A sequence that was taken runs no longer."""

    def rank(self, seq: Sequence) -> tuple[float, ...]:
        """The order in which prompts are computed; smaller first."""
        return seq.key

    def precedes(self, waiting: Sequence, running: Sequence) -> bool:
        """Whether ``waiting`` is let in before the prompt of ``running`` goes on."""
        return False

    def yields(self, seq: Sequence, most: int) -> bool:
        """Whether steps with the prompt of ``seq`` stay short, so that somebody else need not wait for their end."""
        return False

    def victim(self, waiting: Sequence, running: Iterable[Sequence]) -> Sequence | None:
        """Who has to give up its place for ``waiting``, which finds no room."""
        return None


class _Tenant:
    """One tenant's line, what it was given so far (tokens / weight), and how many of its sequences run."""

    __slots__ = ("line", "num_running", "served", "weight")

    def __init__(self, served: float) -> None:
        self.line = Queue()
        self.num_running = 0
        self.served = served
        self.weight = 1.0


class FairQueue(Queue):
    """Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", 2024).

    Every row is charged to its tenant: a computed token counts 1, a drawn one 1 more, both divided by the tenant's
    weight. The tenant with the smallest counter goes first; one that comes back after a pause starts at most ``credit``
    below the smallest counter of those that are active: enough that a burst of somebody who uses less than its share is
    served at once, too little to starve others. Where there is no room for a tenant that runs less than
    its share of the sequences, the latest sequence of the one that is furthest above its own share is preempted: its
    pages stay in the prefix cache. A tenant never gets above its share that way, so places do not go to and fro.

    A step under way cannot be called back. So a tenant with more prompts than a step holds takes short steps while
    somebody who was served far less is here, or was here lately and may come back (``yields``).
    """

    __slots__ = ("_charged", "_credit", "_idle", "_num_waiting", "_tenants")
    charges = True

    def __init__(self, credit: float = CREDIT) -> None:
        super().__init__()
        self._credit = credit
        self._tenants: dict[str, _Tenant] = {}  # those that wait or run
        # The others, those who left last at the end: their counters, and what all had been charged then.
        self._idle: dict[str, tuple[float, int]] = {}
        self._charged = 0
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """All waiting sequences, in no particular order."""
        for tenant in list(self._tenants.values()):
            yield from tenant.line

    def push(self, seq: Sequence) -> None:
        """See ``Queue.push``."""
        tenant = self._tenants.get(seq.tenant)
        if tenant is None:
            level = min((other.served for other in self._tenants.values()), default=0.0)
            saved, _ = self._idle.pop(seq.tenant, (-math.inf, 0))
            tenant = _Tenant(max(saved, level - self._credit))
            self._tenants[seq.tenant] = tenant
        tenant.weight = seq.weight
        tenant.line.push(seq)
        self._num_waiting += 1
        self.num_tokens += seq.num_in_line

    def peek(self) -> Sequence | None:
        """See ``Queue.peek``."""
        heads = [seq for tenant in self._tenants.values() if (seq := tenant.line.peek()) is not None]
        return min(heads, key=self.rank, default=None)

    def pop(self) -> Sequence:
        """See ``Queue.pop``."""
        seq = self.peek()
        if seq is None:
            raise IndexError("pop from an empty queue")
        self.take(seq)
        return seq

    def take(self, seq: Sequence) -> None:
        """See ``Queue.take``."""
        tenant = self._tenants[seq.tenant]
        tenant.line.take(seq)
        tenant.num_running += 1
        self._num_waiting -= 1
        self.num_tokens -= seq.num_in_line

    def remove(self, seq: Sequence) -> None:
        """See ``Queue.remove``."""
        self._tenants[seq.tenant].line.remove(seq)
        self._num_waiting -= 1
        self.num_tokens -= seq.num_in_line
        self._rest(seq.tenant)

    def charge(self, seq: Sequence, tokens: int) -> None:
        """See ``Queue.charge``."""
        self._tenants[seq.tenant].served += tokens / seq.weight
        self._charged += tokens

    def leave(self, seq: Sequence) -> None:
        """See ``Queue.leave``."""
        self._tenants[seq.tenant].num_running -= 1
        self._rest(seq.tenant)

    def rank(self, seq: Sequence) -> tuple[float, ...]:
        """See ``Queue.rank``; of two tenants that were served the same, the one that runs less goes first."""
        tenant = self._tenants[seq.tenant]
        return (tenant.served, tenant.num_running, *seq.key)

    def precedes(self, waiting: Sequence, running: Sequence) -> bool:
        """See ``Queue.precedes``."""
        return waiting.tenant != running.tenant and self.rank(waiting) < self.rank(running)

    def yields(self, seq: Sequence, most: int) -> bool:
        """See ``Queue.yields``."""
        mine = self._tenants[seq.tenant]
        running = len(seq.tokens) - seq.num_queued if seq.slot >= 0 else 0
        if mine.line.num_tokens + running <= most:
            return False
        level = mine.served - self._credit / 4  # those a little below are about even
        if any(other.served < level for other in self._tenants.values()):
            return True
        for served, left in islice(reversed(self._idle.values()), NUM_EXPECTED):
            since = self._charged - left
            if since < LATELY and served < level - since / mine.weight:  # it left so far behind
                return True
        return False

    def victim(self, waiting: Sequence, running: Iterable[Sequence]) -> Sequence | None:
        """See ``Queue.victim``."""
        tenants = self._tenants
        places = sum(tenant.num_running for tenant in tenants.values())
        share = places / sum(tenant.weight for tenant in tenants.values())
        mine = tenants[waiting.tenant]
        if mine.num_running + 1 > share * mine.weight:
            return None
        excess = {name: tenant.num_running - share * tenant.weight for name, tenant in tenants.items()}
        candidates = [seq for seq in running if excess[seq.tenant] > 0]
        return max(candidates, key=lambda seq: (excess[seq.tenant], seq.key), default=None)

    def _rest(self, name: str) -> None:
        """Keep only the counter of a tenant that has nothing to do now; of too many, forget who paused longest."""
        tenant = self._tenants[name]
        if tenant.num_running or len(tenant.line):
            return
        del self._tenants[name]
        self._idle[name] = tenant.served, self._charged
        if len(self._idle) > MAX_IDLE_TENANTS:
            del self._idle[next(iter(self._idle))]
