"""``octavo bench soak``: many unlike requests for minutes, some given up half-way, in a cache that is too small.

The engine runs in a process of its own, as in a server, without HTTP. Prompts and answers have random lengths, some share
a beginning; sampling options of every kind are mixed. While it runs the page pool is asked to prove itself and the memory
of engine, this process and device is watched. Any wrong or missing answer, a pool that does not add up, memory that grows,
or a stall ends it with status 1 and a sentence.
"""

from __future__ import annotations

import asyncio
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from octavo.bench.metrics import percentile
from octavo.engine.cache.pool import PoolError
from octavo.engine.client.base import EngineClient
from octavo.errors import OctavoError
from octavo.protocol.control import CheckPool, EngineStats, GetStats, ResetPrefixCache
from octavo.protocol.generate import GenerateRequest, SamplingParams, TokenDelta

MIB = 1 << 20
SETTLE_SHARE = 0.25  # of the time, after which memory may not grow any more
DEVICE_GROWTH = 64 * MIB
HOST_GROWTH, HOST_SHARE = 96 * MIB, 0.05  # whichever is more
STALL_S = 60.0
PREFIXES = 8
LOGPROBS = 5


@dataclass(frozen=True)
class Mix:
    """What is asked for; lengths in tokens, shares from 0 to 1."""

    concurrency: int = 256
    longest_prompt: int = 2048
    longest_answer: int = 512
    aborted: float = 0.1
    shared: float = 0.3
    seed: int = 0

    def request(self, number: int, rng: random.Random, vocab_size: int) -> GenerateRequest:
        """The ``number``-th request: short ones are more common than long ones."""
        prompt = self._prompt(rng, vocab_size)
        answer = max(1, int(self.longest_answer ** rng.random()))
        options: dict[str, Any] = {"max_tokens": answer, "temperature": rng.choice((0.0, 0.0, 0.7, 1.3))}
        extras: list[dict[str, Any]] = [
            {"top_p": 0.9},
            {"top_k": 20},
            {"min_p": 0.05},
            {"presence_penalty": 0.5, "frequency_penalty": 0.3},
            {"repetition_penalty": 1.1},
            {"logprobs": LOGPROBS},
            {"prompt_logprobs": 1},
            {"logit_bias": {rng.randrange(vocab_size): 3.0}},
            {"seed": number},
            {"min_tokens": min(4, answer), "stop_token_ids": [rng.randrange(vocab_size)]},
            {"ignore_eos": True},
        ]
        for extra in rng.sample(extras, rng.randrange(4)):
            options |= extra
        eos = [rng.randrange(vocab_size)]
        return GenerateRequest(
            id=number, prompt_token_ids=prompt, sampling=SamplingParams(**options), eos_token_ids=eos
        )

    def _prompt(self, rng: random.Random, vocab_size: int) -> list[int]:
        length = max(1, int(self.longest_prompt ** rng.random()))
        prompt = rng.choices(range(vocab_size), k=length)
        if rng.random() < self.shared:
            common = random.Random(self.seed * PREFIXES + rng.randrange(PREFIXES))
            head = common.choices(range(vocab_size), k=length)
            keep = rng.randint(0, length - 1)
            prompt[:keep] = head[:keep]
        return prompt


@dataclass
class Memory:
    """Bytes at a moment (seconds since the start); ``device`` None = there is no GPU."""

    at_s: float
    engine: int
    own: int
    device: int | None


@dataclass
class Report:
    """What a soak saw; ``problems`` empty = it passed."""

    seconds: float = 0.0
    answered: int = 0
    aborted: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    preemptions: int = 0
    pool_checks: int = 0
    longest_silence_s: float = 0.0
    memory: list[Memory] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Soak:
    """One run over an engine that nobody else uses."""

    def __init__(
        self,
        client: EngineClient,
        mix: Mix,
        duration_s: float,
        watch: Callable[[], tuple[int, int, int | None]],
        tell: Callable[[str], None],
    ) -> None:
        self.client = client
        self.mix = mix
        self.duration_s = duration_s
        self.watch = watch
        self.tell = tell
        self.report = Report()
        self.rng = random.Random(mix.seed)
        self.next_id = 0
        self.began = time.monotonic()
        self.heard = self.began
        self.open: dict[int, asyncio.Future[None]] = {}

    async def run(self) -> Report:
        """Load, watch, drain, and look once more at the empty engine."""
        self.began = self.heard = time.monotonic()
        clients = [asyncio.create_task(self._client()) for _ in range(self.mix.concurrency)]
        watcher = asyncio.create_task(self._watch())
        try:
            await asyncio.gather(*clients)
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
        self.report.seconds = time.monotonic() - self.began
        await self._at_rest()
        self._judge()
        return self.report

    @property
    def _over(self) -> bool:
        late = time.monotonic() - self.began >= self.duration_s
        return late or bool(self.report.problems) or not self.client.alive

    async def _client(self) -> None:
        while not self._over:
            self.next_id += 1
            await self._one(self.mix.request(self.next_id, self.rng, self.client.info.vocab_size))

    async def _one(self, request: GenerateRequest) -> None:
        """Send a request, and abort it after some tokens where its lot is drawn."""
        limit = request.sampling.max_tokens or 1
        give_up = self.rng.randint(0, limit) if self.rng.random() < self.mix.aborted else limit + 1
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        count = 0

        def sink(delta: TokenDelta) -> None:
            nonlocal count
            now = time.monotonic()
            self.report.longest_silence_s = max(self.report.longest_silence_s, now - self.heard)
            self.heard = now
            count += len(delta.tokens)
            if delta.finish_reason is not None:
                self._ended(request, delta, count)
            elif count >= give_up:
                self.client.abort([request.id])
                self.report.aborted += 1
            else:
                return
            if not done.done():
                done.set_result(None)

        self.open[request.id] = done
        try:
            self.client.submit(request, sink)
            if give_up == 0:  # before its first token
                await asyncio.sleep(self.rng.random() * 0.05)
                if not done.done():
                    self.client.abort([request.id])
                    self.report.aborted += 1
                    done.set_result(None)
            await done
        except OctavoError as error:
            self.report.problems.append(f"Request {request.id} was refused: {error}")
        finally:
            del self.open[request.id]

    def _ended(self, request: GenerateRequest, delta: TokenDelta, count: int) -> None:
        """An answer must end for a reason that fits its length."""
        report, limit = self.report, request.sampling.max_tokens or 1
        report.answered += 1
        report.prompt_tokens += len(request.prompt_token_ids)
        report.answer_tokens += count
        reason = delta.finish_reason
        if reason == "error":
            report.problems.append(f"Request {request.id} failed: {delta.error}")
        elif reason not in ("stop", "length") or count > limit or (reason == "length" and count != limit):
            report.problems.append(
                f"Request {request.id} ended with {reason} after {count} of {limit} tokens."
            )

    async def _watch(self) -> None:
        """Prove the pool and note memory a hundred times in all; end everything where nothing is heard for long."""
        pause = max(0.2, min(5.0, self.duration_s / 100))
        while True:
            await asyncio.sleep(pause)
            silent = time.monotonic() - self.heard
            if silent > STALL_S or not self.client.alive:
                cause = "The engine died." if not self.client.alive else f"Nothing for {silent:.0f} s."
                self._give_up(cause)
                return
            if not await self._pool_adds_up():
                return
            await asyncio.to_thread(self._note)

    async def _pool_adds_up(self) -> bool:
        try:
            await self.client.control(CheckPool())
        except (OctavoError, PoolError) as error:
            self._give_up(f"The page pool does not add up: {error}")
            return False
        self.report.pool_checks += 1
        return True

    def _note(self) -> None:
        memory = Memory(time.monotonic() - self.began, *self.watch())
        self.report.memory.append(memory)
        device = "" if memory.device is None else f", device {memory.device / MIB:.0f} MiB"
        self.tell(
            f"{memory.at_s:6.0f} s: {self.report.answered} answers, {self.report.aborted} aborted, "
            f"{self.report.answer_tokens} tokens; engine {memory.engine / MIB:.0f} MiB{device}"
        )

    def _give_up(self, cause: str) -> None:
        self.report.problems.append(cause)
        self.client.abort(list(self.open))
        for done in self.open.values():
            if not done.done():
                done.set_result(None)

    async def _at_rest(self) -> None:
        """Nothing may be held when nobody asks for anything."""
        if not self.client.alive:
            return
        for _ in range(200):
            stats = await self.client.control(GetStats())
            if isinstance(stats, EngineStats) and not stats.num_running and not stats.num_waiting:
                break
            await asyncio.sleep(0.05)
        if not await self._pool_adds_up():
            return
        await self.client.control(ResetPrefixCache())
        stats = await self.client.control(GetStats())
        if not isinstance(stats, EngineStats):
            raise TypeError("GetStats was not answered with statistics")
        self.report.preemptions = stats.num_preemptions
        if stats.num_running or stats.num_waiting or stats.kv_cache_usage:
            self.report.problems.append(
                f"At rest {stats.num_running} sequences run, {stats.num_waiting} wait, and "
                f"{stats.kv_cache_usage:.2%} of the pages are held."
            )

    def _judge(self) -> None:
        """Memory after the first quarter of the run against the end; a soak without preemptions proves little."""
        report = self.report
        if not report.preemptions:
            report.problems.append(
                "Nothing was preempted, so the cache was too large to test that: lower --num-gpu-blocks-override."
            )
        settled = [memory for memory in report.memory if memory.at_s >= SETTLE_SHARE * self.duration_s]
        if len(settled) < 4:
            report.problems.append("The run was too short to say anything about memory.")
            return
        third = max(1, len(settled) // 3)
        for name in ("engine", "own", "device"):
            values = [float(getattr(memory, name) or 0) for memory in settled]
            before, after = percentile(values[:third], 50), percentile(values[-third:], 50)
            most = DEVICE_GROWTH if name == "device" else max(HOST_GROWTH, HOST_SHARE * before)
            if after - before > most:
                report.problems.append(
                    f"Memory of {name} grew from {before / MIB:.0f} to {after / MIB:.0f} MiB."
                )


def resident_bytes(pid: int | None) -> int:
    """What a process holds in memory; 0 where that cannot be told."""
    try:
        status = Path(f"/proc/{pid or 'self'}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmRSS:\s+([0-9]+) kB", status)
    return int(found[1]) * 1024 if found else 0


def device_bytes() -> int | None:
    """What is in use on the first GPU, by all programs."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return int(done.stdout.split()[0]) * MIB if done.returncode == 0 else None


def watcher(pid: int | None) -> Callable[[], tuple[int, int, int | None]]:
    """(engine, this process, device) in bytes."""
    return lambda: (resident_bytes(pid), resident_bytes(None), device_bytes())


def summary(report: Report) -> str:
    """The end of the story."""
    first = (
        f"{report.seconds:.0f} s, {report.answered} answers of {report.answer_tokens} tokens to prompts of "
        f"{report.prompt_tokens}, {report.aborted} aborted, {report.preemptions} preemptions, "
        f"{report.pool_checks} proofs of the pool, longest silence {report.longest_silence_s:.2f} s."
    )
    lines = [f"PROBLEM: {problem}" for problem in report.problems[:20]]
    return "\n".join([first, *lines, "Soak failed." if report.problems else "Soak passed."])


def as_json(report: Report) -> dict[str, Any]:
    """All of it, as plain values."""
    return asdict(report)
