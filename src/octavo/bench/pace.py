"""The scheduler's pace in virtual time: a closed loop of clients over a runner that computes nothing but takes its time.

    python -m octavo.bench.pace --clients 1,8,32,64,128,256

The engine is the real one; only its clock is made up. A step takes as long as a model of the device says, so the figures
tell how a policy of filling steps behaves, not how fast a device is: no GPU, no noise, seconds to run.
"""

from __future__ import annotations

import argparse
import heapq
import sys
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from octavo.bench.metrics import percentile
from octavo.engine.cache.layout import CacheGroup, CacheLayout
from octavo.engine.cache.spec import FullKV
from octavo.engine.core import EngineCore
from octavo.engine.executor.inline import InlineExecutor
from octavo.engine.executor.null import NullRunner
from octavo.engine.settings import EngineSettings
from octavo.protocol.generate import GenerateRequest, SamplingParams
from octavo.protocol.plan import GrammarMask, StepPlan, StepResult

VOCAB_SIZE = 50_000
PAGE_SIZE = 16
REPLY_S = 0.001  # from the last token of an answer to the client's next request in the engine


@dataclass(frozen=True)
class Device:
    """Seconds of a step: products by tokens (measured points, then a rate), cache bytes by context, and the rest.

    The defaults are Llama-3.1-8B's shape in bf16 on an H100: all products of a step with rotating weights.
    """

    tokens: tuple[int, ...] = (1, 32, 64, 128, 256, 512)
    products_ms: tuple[float, ...] = (5.63, 5.75, 5.84, 6.14, 7.24, 12.0)
    tokens_per_s: float = 47_700.0  # beyond the last point
    kv_bytes: float = 131072.0  # a token
    bytes_per_s: float = 2.8e12
    rest_ms: float = 0.6

    def seconds(self, plan: StepPlan) -> float:
        """How long a step takes."""
        total = sum(plan.num_tokens)
        context = sum(start + n for start, n in zip(plan.starts, plan.num_tokens) if n == 1)
        return (self._products_ms(total) + self.rest_ms) / 1e3 + context * self.kv_bytes / self.bytes_per_s

    def _products_ms(self, total: int) -> float:
        if total >= self.tokens[-1]:
            return self.products_ms[-1] + 1e3 * (total - self.tokens[-1]) / self.tokens_per_s
        right = bisect_left(self.tokens, total)
        if right == 0:
            return self.products_ms[0]
        low, high = self.tokens[right - 1], self.tokens[right]
        share = (total - low) / (high - low)
        return self.products_ms[right - 1] * (1 - share) + self.products_ms[right] * share


class VirtualExecutor:
    """A null runner behind a queue of steps; ``now`` moves on when a step is collected."""

    def __init__(self, runner: NullRunner, seconds: Callable[[StepPlan], float]) -> None:
        self.runner = runner
        self.layout = runner.layout
        self.num_pages = runner.num_pages
        self.num_slots = runner.num_slots
        self.seconds = seconds
        self.now = 0.0
        self.free_at = 0.0  # when the device has done everything that is queued
        self.done_at: deque[float] = deque()
        self.step_s: list[float] = []

    def forward(self, plan: StepPlan) -> None:
        """See ``Executor.forward``."""
        took = self.seconds(plan)
        self.step_s.append(took)
        self.free_at = max(self.free_at, self.now) + took
        self.done_at.append(self.free_at)
        self.runner.forward(plan)

    def sample(self, masks: list[GrammarMask]) -> None:
        """See ``Executor.sample``."""
        self.runner.sample(masks)

    def collect(self) -> StepResult:
        """See ``Executor.collect``: waits, in virtual time."""
        self.now = max(self.now, self.done_at.popleft())
        return self.runner.collect()

    def close(self) -> None:
        """See ``Executor.close``."""
        self.runner.close()


@dataclass(frozen=True)
class Figures:
    """Output tokens a virtual second, and latencies in virtual milliseconds."""

    clients: int
    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    longest_step_ms: float


class Clients:
    """A closed loop: each client asks again when its answer is complete."""

    def __init__(self, core: EngineCore, executor: VirtualExecutor, lengths: list[tuple[int, int]]) -> None:
        self.core = core
        self.executor = executor
        self.lengths = lengths  # (prompt, answer) of every request, in order
        self.sent: dict[int, float] = {}
        self.last: dict[int, float] = {}
        self.ttft_s: list[float] = []
        self.itl_s: list[float] = []
        self.arrivals: list[float] = []  # a heap
        self.num_tokens = 0

    def run(self, clients: int) -> None:
        """Until every request is answered."""
        self.arrivals = [0.0] * min(clients, len(self.lengths))
        while self.arrivals or self.core.has_work:
            self._submit()
            if not self.core.has_work:
                self.executor.now = max(self.executor.now, self.arrivals[0])
                continue
            deltas = self.core.step()
            now = self.executor.now
            for delta in deltas:
                self._heard(delta.id, len(delta.tokens), now)
                if delta.finish_reason is not None and len(self.sent) + len(self.arrivals) < len(
                    self.lengths
                ):
                    heapq.heappush(self.arrivals, now + REPLY_S)

    def _submit(self) -> None:
        while self.arrivals and self.arrivals[0] <= self.executor.now:
            at = heapq.heappop(self.arrivals)
            number = len(self.sent)
            prompt, answer = self.lengths[number]
            ids = [(number * 7919 + i) % VOCAB_SIZE for i in range(prompt)]
            sampling = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True)
            self.sent[number] = at
            self.core.submit(GenerateRequest(id=number, prompt_token_ids=ids, sampling=sampling))

    def _heard(self, number: int, count: int, now: float) -> None:
        if not count:
            return
        self.num_tokens += count
        if number in self.last:
            self.itl_s.append(now - self.last[number])
        else:
            self.ttft_s.append(now - self.sent[number])
        self.last[number] = now


def simulate(
    clients: int,
    lengths: list[tuple[int, int]],
    *,
    max_step_ms: float = 50.0,
    device: Device | None = None,
    max_num_batched_tokens: int = 8192,
) -> Figures:
    """Answer requests of these (prompt, answer) lengths for so many clients, and say how it went."""
    most = max(prompt + answer for prompt, answer in lengths)
    layout = CacheLayout((CacheGroup(FullKV(PAGE_SIZE, 1), (0,)),), PAGE_SIZE, 1)
    pages = clients * layout.pages_for(most) + 64
    runner = NullRunner(layout, num_pages=pages, num_slots=clients, vocab_size=VOCAB_SIZE)
    executor = VirtualExecutor(runner, (device or Device()).seconds)
    settings = EngineSettings(
        max_model_len=most,
        max_num_seqs=clients,
        max_num_batched_tokens=max_num_batched_tokens,
        vocab_size=VOCAB_SIZE,
        overlap=True,
        max_step_ms=max_step_ms,
        max_queue_len=len(lengths),
    )
    core = EngineCore(InlineExecutor(executor), settings, clock=lambda: executor.now)
    loop = Clients(core, executor, lengths)
    loop.run(clients)
    core.check()
    return Figures(
        clients,
        loop.num_tokens / executor.now,
        1e3 * percentile(loop.ttft_s, 50),
        1e3 * percentile(loop.ttft_s, 99),
        1e3 * percentile(loop.itl_s, 50),
        1e3 * percentile(loop.itl_s, 99),
        1e3 * max(executor.step_s),
    )


def main(argv: list[str] | None = None) -> int:
    """Print one line for each number of clients."""
    parser = argparse.ArgumentParser(prog="pace", description=__doc__)
    parser.add_argument("--clients", default="1,8,32,64,128,256", help="comma separated")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--answer", type=int, default=128, help="tokens")
    parser.add_argument("--requests-per-client", type=int, default=4)
    parser.add_argument("--max-step-ms", type=float, default=50.0)
    args = parser.parse_args(argv)
    print(f"{'clients':>8}{'tok/s':>9}{'TTFT p50':>10}{'p99':>8}{'ITL p50':>9}{'p99':>7}{'longest step':>14}")
    for clients in map(int, args.clients.split(",")):
        lengths = [(args.prompt, args.answer)] * (clients * args.requests_per_client)
        found = simulate(clients, lengths, max_step_ms=args.max_step_ms)
        print(
            f"{clients:>8}{found.tokens_per_s:>9.0f}{found.ttft_p50_ms:>10.0f}{found.ttft_p99_ms:>8.0f}"
            f"{found.itl_p50_ms:>9.1f}{found.itl_p99_ms:>7.1f}{found.longest_step_ms:>14.1f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
