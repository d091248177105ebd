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


def serve_prompts(chosen: EngineOptions, prompts: list[list[int]], limit_s: float = 120) -> list[list[int]]:
    """Six greedy tokens for each, from engines behind a client."""

    async def main() -> list[list[int]]:
        client = host.connect(chosen, host.open_files(chosen))
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
        await client.close()
        return [found[id] for id in sorted(found)]

    return asyncio.run(asyncio.wait_for(main(), limit_s))


def kill_a_rank(chosen: EngineOptions, rank: int) -> None:
    """Kill one of two workers while requests run: every request ends with a reason within five seconds, although the
    other rank may be waiting for the dead one; the engine ends with status 1 and leaves nobody."""

    async def main() -> None:
        client = host.connect(chosen, host.open_files(chosen))
        assert isinstance(client, SocketClient)
        processes = [client.pid, *descendants(client.pid)]
        workers = [
            pid
            for pid in descendants(client.pid)
            if b"executor.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
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
        os.kill(sorted(workers)[rank], signal.SIGKILL)
        while client.alive or any(delta.finish_reason is None for delta in last.values()):
            assert time.monotonic() - began < 5, "requests are still open"
            await asyncio.sleep(0.01)
        assert len(last) == 4
        for delta in last.values():
            assert delta.finish_reason == "error"
            assert delta.error is not None and f"Worker {rank} has ended with status -9" in delta.error, (
                delta.error
            )
        wait_gone(processes, 8)
        assert client._channel.process.wait(5) == 1
        await client.close()

    asyncio.run(main())
