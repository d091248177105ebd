"""Workers in processes of their own, one a device: every plan goes to all through shared memory, rank 0 answers.

    engine                     ring, read by all     worker 0            worker 1
    forward(plan)   ──Forward──>  ││││││││  ──>       runner.forward      runner.forward
    sample(masks)   ──Sample───>  ││││││││  ──>       runner.sample       runner.sample
    collect()       ──Collect──>  ││││││││  ──>       runner.collect      runner.collect
                    <──Result────────────────────────── socket

A worker that ends or fails is seen at the next call as the end of its socket, also while another worker waits for
it in vain, and becomes ``EngineDeadError`` (or the worker's own error while it starts); the others are killed at once,
since they may wait for the dead one on their devices for ever. One that hangs is seen by its missing beats (pulse.py).
Further machines speak through a ``Node`` each.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from octavo.engine.cache.layout import CacheLayout
from octavo.engine.executor.crew import STOP_S, Crew, Node, Speaker
from octavo.engine.executor.frames import (
    Alive,
    Collect,
    Forward,
    FromWorker,
    Hello,
    Progress,
    Result,
    Sample,
    Stop,
    ToWorker,
    frame,
    unpack_layout,
)
from octavo.engine.executor.pulse import SLICE_S, START_FACTOR, Allowance, Vigil
from octavo.engine.process import Failed
from octavo.errors import EngineDeadError, OctavoError
from octavo.protocol.plan import GrammarMask, StepPlan, StepResult

SILENCE_S = 300.0
STEP_S = 20.0
LAST_WORDS_S = 0.3

ProgressCall = Callable[[str, int, int], None]  # phase, done, in all
Nodes = Callable[[Callable[[], None]], Sequence[Node]]


class MultiprocExecutor:
    """Implements ``Executor`` over worker processes.

    ``factory`` is ``module:function`` of an ``executor.base.Factory``; ``arguments`` must be JSON. The cache has as many
    pages as the worker with the fewest. ``nodes`` waits for ranks that others start, which follow those of ``crew``; it
    calls what it is given, which raises where a worker here has failed meanwhile. ``silence_s``: a rank that reports
    nothing for so long while it starts has failed; ``step_s``: so has one without a beat for so long (three times that
    at start), or a step that takes longer than this and than steps took so far. ``collects_early`` may be set where several
    steps are under way: each result is asked for at once, for rank 0 gives it before it begins with the next step.
    """

    collects_early = False

    def __init__(
        self,
        factory: str,
        arguments: dict[str, Any],
        *,
        crew: Crew,
        num_ranks: int | None = None,
        nodes: Nodes | None = None,
        silence_s: float = SILENCE_S,
        step_s: float = STEP_S,
        progress: ProgressCall | None = None,
    ) -> None:
        self._encode = msgspec.msgpack.Encoder().encode
        self._closed = False
        self._started = False
        self._silence_s = silence_s
        self._progress = progress
        self._crew = crew
        self._crew.ring.check = self.watch
        self._speakers: list[Speaker] = [*crew.workers]
        self._nodes: list[Node] = []
        self._vigil = Vigil(START_FACTOR * step_s)
        self._allowance = Allowance(step_s, silence_s)
        self._news: deque[tuple[int, Hello | Progress]] = deque()
        self._results: deque[StepResult] = deque()
        self._steps: deque[tuple[int, float]] = deque()  # tokens of those in flight, and when they were sent
        self._last_s = 0.0  # when the last result came
        try:
            crew.build(factory, arguments, num_ranks or len(crew.workers))
            if nodes is not None:
                self._nodes.extend(nodes(self.watch))
                self._speakers.extend(self._nodes)
            hellos = self._greetings()
        except BaseException:
            self._kill()
            self._release(STOP_S)
            raise
        first = hellos[0]
        self.layout: CacheLayout = unpack_layout(first.layout)
        self.num_pages = min(hello.num_pages for hello in hellos.values())
        self.num_slots = min(hello.num_slots for hello in hellos.values())
        self.facts = first.facts
        self._started = True
        self._vigil = Vigil(step_s)

    @property
    def pids(self) -> list[int]:
        """The process ids of this machine's workers, by rank."""
        return [worker.process.pid for worker in self._crew.workers]

    def forward(self, plan: StepPlan) -> None:
        """See ``Executor.forward``."""
        self._steps.append((sum(plan.num_tokens), time.monotonic()))
        self._broadcast(Forward(plan))

    def sample(self, masks: list[GrammarMask]) -> None:
        """See ``Executor.sample``."""
        self._broadcast(Sample(masks))
        if self.collects_early:
            self._broadcast(Collect())

    def collect(self) -> StepResult:
        """See ``Executor.collect``."""
        if not self.collects_early:
            self._broadcast(Collect())
        tokens, sent_s = self._steps.popleft()
        # Two looks more: where a process is stopped that is to be said, not that the step took too long.
        allowed_s = self._allowance.seconds(tokens) + 2 * SLICE_S
        self._vigil.begin()
        while not self._results:
            self._listen(SLICE_S)
            if not self._results and self._look() > allowed_s:
                raise self._stuck(allowed_s)
        now = time.monotonic()
        self._allowance.observe(tokens, now - max(sent_s, self._last_s))
        self._last_s = now
        return self._results.popleft()

    def watch(self) -> None:
        """See ``Executor.watch``."""
        if not self._closed:
            self._listen(0.0)
            self._look()

    def close(self) -> None:
        """See ``Executor.close``."""
        if self._closed:
            return
        try:
            self._broadcast(Stop())
        except OctavoError:
            self._kill()
        self._release(STOP_S)

    def _greetings(self) -> dict[int, Hello]:
        """Every rank's first message, in whatever order they come: a failed start must not wait for its turn."""
        waiting = {rank: "the start" for speaker in self._speakers for rank in speaker.ranks}
        heard = dict.fromkeys(waiting, time.monotonic())
        hellos: dict[int, Hello] = {}
        while waiting:
            if not self._news:
                self._listen(min(SLICE_S, self._silence_s))
                self._look(waiting)
            while self._news:
                rank, message = self._news.popleft()
                heard[rank] = time.monotonic()
                if isinstance(message, Hello):
                    hellos[rank] = message
                    waiting.pop(rank, None)
                    continue
                waiting[rank] = message.phase
                if rank == 0 and self._progress is not None:
                    self._progress(message.phase, message.done, message.total)
            if waiting and time.monotonic() - min(heard[rank] for rank in waiting) > self._silence_s:
                silent = ", ".join(f"rank {rank} since {phase}" for rank, phase in waiting.items())
                raise EngineDeadError(
                    f"The start hangs: nothing was heard for {self._silence_s:g} s ({silent}).",
                    "Look at that rank's messages above, or raise --distributed-timeout-seconds.",
                )
        return hellos

    def _broadcast(self, message: ToWorker) -> None:
        payload = frame(self._encode(message))
        if self._closed:
            raise EngineDeadError("The workers have been stopped.")
        self._crew.ring.write(payload)
        for node in self._nodes:
            node.write(payload)

    def _listen(self, wait_s: float) -> None:
        """Take what ranks have said, after waiting so long for the first word; raises where one failed or is gone.

        The highest rank first: but for rank 0 they speak in service only to say that they failed.
        """
        poll = select.poll()
        for speaker in self._speakers:
            poll.register(speaker.socket, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(wait_s * 1e3)}
        if not ready:
            return
        for speaker in reversed(self._speakers):
            if speaker.socket.fileno() in ready:
                rank, message = speaker.read()
                if isinstance(message, Result) and rank == 0:
                    self._results.append(message.result)
                elif isinstance(message, Hello | Progress) and not self._started:
                    self._news.append((rank, message))
                elif not isinstance(message, Alive):
                    raise self._dead(rank, message)

    def _look(self, phases: Mapping[int, str] | None = None) -> float:
        """Raise where ranks have given no beat for too long; returns how long this wait has been."""
        beats = self._crew.beats() | {node.ranks[0]: node.heard for node in self._nodes}
        silent = self._vigil.look(beats)
        if silent:
            names = " and ".join(self._name(rank, phases or {}) for rank in silent)
            self._kill()
            raise EngineDeadError(
                f"{names}: no sign of life for {self._vigil.limit_s:g} s. The process is stopped, or its machine hangs or "
                "cannot be reached.",
                "Look at it there; where it is only slow raise --execute-model-timeout-seconds.",
            )
        return self._vigil.waited_s

    def _name(self, rank: int, phases: Mapping[int, str]) -> str:
        """Who is silent; of another machine nobody else is known to live."""
        node = next((node for node in self._nodes if rank == node.ranks[0]), None)
        phase = f" in phase {phases[rank]!r}" if rank in phases else ""
        if node is None:
            return f"Worker {rank}{phase}"
        return f"The machine of worker {', '.join(map(str, node.ranks))}{phase}"

    def _stuck(self, waited_s: float) -> OctavoError:
        """The error for a step that does not end although all workers run."""
        self._kill()
        return EngineDeadError(
            f"No worker has answered for {waited_s:.0f} s, though all run: they wait for each other or for their devices.",
            "Their messages, or NCCL_DEBUG=INFO, may say why; for steps that take so long raise "
            "--execute-model-timeout-seconds.",
        )

    def _dead(self, rank: int, message: FromWorker | None) -> OctavoError:
        """The error for a rank that failed or vanished; what is left of the others is killed."""
        rank, message = min([(rank, message), *self._last_words(rank)], key=lambda words: _weight(words[1]))
        speaker = next(each for each in self._speakers if rank in each.ranks)
        cause = f"Worker {rank} said {type(message).__name__} out of turn."
        if message is None:
            cause = f"Worker {rank} has ended with status {speaker.status()}."
        self._kill()
        if isinstance(message, Failed):
            error = message.error()
            if not self._started:  # it never started: its own error says it best
                return error
            cause = f"Worker {rank} failed: {error}"
        return EngineDeadError(cause)

    def _last_words(self, rank: int) -> list[tuple[int, FromWorker | None]]:
        """What the other ranks say right after the first failure: that one may be a consequence."""
        words: list[tuple[int, FromWorker | None]] = []
        open_speakers = [speaker for speaker in self._speakers if rank not in speaker.ranks]
        end = time.monotonic() + LAST_WORDS_S
        while open_speakers and time.monotonic() < end:
            poll = select.poll()
            for speaker in open_speakers:
                poll.register(speaker.socket, select.POLLIN)
            ready = {fd for fd, _ in poll.poll((end - time.monotonic()) * 1e3)}
            for speaker in [each for each in open_speakers if each.socket.fileno() in ready]:
                found = speaker.read()
                if found[1] is None or isinstance(found[1], Failed):
                    words.append(found)
                    open_speakers.remove(speaker)
        return words

    def _kill(self) -> None:
        for speaker in self._speakers:
            speaker.kill()

    def _release(self, wait_s: float) -> None:
        self._closed = True
        for node in self._nodes:
            node.stop(wait_s)
        self._crew.close(wait_s)


def _weight(message: FromWorker | None) -> int:
    """How well a message explains why ranks fail together, best first: an error of ours, a process that vanished, and
    errors that others' libraries raised, often because somebody vanished."""
    if isinstance(message, Failed):
        return 0 if message.deliberate else 2
    return 1
