"""An engine in its own process over several ranks: prompts served, ranks killed, processes counted."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from octavo import host
from octavo.config import EngineOptions
from octavo.engine.client.base import EngineClient
from octavo.engine.client.socket import SocketClient
from octavo.protocol.generate import GenerateRequest, SamplingParams, TokenDelta


def add_tokenizer(folder: Path, size: int = 128) -> None:
    """A word a token, for a checkpoint that has none."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))


def descendants(pid: int) -> list[int]:
    """Every process below one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
            if parent == pid:
                found += [int(entry.name), *descendants(int(entry.name))]
    return found


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def wait_gone(pids: list[int], limit_s: float = 10) -> None:
    end = time.monotonic() + limit_s
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < end, f"still there: {[pid for pid in pids if not gone(pid)]}"
        time.sleep(0.02)


def workers_of(pid: int) -> list[int]:
    """The worker processes below one, oldest first."""
    found = []
    for child in descendants(pid):
        try:
            if b"executor.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
        except OSError:
            continue
    return sorted(found)


async def answer_all(client: EngineClient, prompts: list[list[int]]) -> list[list[int]]:
    """Six greedy tokens for each prompt."""
    found: dict[int, list[int]] = {id: [] for id in range(len(prompts))}
    done: set[int] = set()

    def sink(delta: TokenDelta) -> None:
        found[delta.id] += delta.tokens
        if delta.finish_reason is not None:
            done.add(delta.id)

    for id, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
        client.submit(GenerateRequest(id=id, prompt_token_ids=prompt, sampling=sampling), sink)
    while len(done) < len(prompts):
        await asyncio.sleep(0.01)
    return [found[id] for id in sorted(found)]


def serve_prompts(chosen: EngineOptions, prompts: list[list[int]], limit_s: float = 120) -> list[list[int]]:
    """The answers of engines behind a client."""

    async def main() -> list[list[int]]:
        client = host.connect(chosen, host.open_files(chosen))
        found = await answer_all(client, prompts)
        await client.close()
        return found

    return asyncio.run(asyncio.wait_for(main(), limit_s))


async def lose_a_rank(client: EngineClient, rank: int, number: signal.Signals, told: str) -> None:
    """Kill or stop one of two workers while requests run: every request ends within five seconds, those that need it with
    the reason, although the other rank may be waiting for it; the engine ends with status 1 and leaves nobody."""
    engines = [one for one in getattr(client, "clients", [client]) if isinstance(one, SocketClient)]
    processes = [pid for one in engines for pid in (one.pid, *descendants(one.pid))]
    workers = [pid for one in engines for pid in workers_of(one.pid)]
    assert len(workers) == 2
    last: dict[int, TokenDelta] = {}
    seen = asyncio.Event()

    def sink(delta: TokenDelta) -> None:
        last[delta.id] = delta
        seen.set()

    for id in range(4):
        sampling = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
        client.submit(GenerateRequest(id=id, prompt_token_ids=[5, 6, 7], sampling=sampling), sink)
    await asyncio.wait_for(seen.wait(), 20)
    began = time.monotonic()
    os.kill(workers[rank], number)
    while client.alive or any(delta.finish_reason is None for delta in last.values()):
        assert time.monotonic() - began < 5, "requests are still open"
        await asyncio.sleep(0.01)
    assert len(last) == 4
    failed = [delta for delta in last.values() if delta.finish_reason == "error"]
    assert len(failed) == 4 // len(engines)
    for delta in failed:
        assert delta.error is not None and told in delta.error, delta.error
    assert engines[rank % len(engines)]._pipe.process.wait(5) == 1
    await client.close()
    wait_gone(processes, 8)


def kill_a_rank(chosen: EngineOptions, rank: int) -> None:
    """See ``lose_a_rank``."""

    async def main() -> None:
        client = host.connect(chosen, host.open_files(chosen))
        await lose_a_rank(client, rank, signal.SIGKILL, f"Worker {rank} has ended with status -9")

    asyncio.run(main())
