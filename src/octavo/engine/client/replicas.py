"""Several engines that run the same model, as one: a request goes where the beginning of its prompt has been before.

    order of preference = engines sorted by hash(first pages of the prompt, engine)       the same for every such prompt
    taken is the first  that has less than its share of the open requests, and a quarter   so that no prefix floods one

(Rendezvous hashing, Thaler & Ravishankar 1998; with bounded loads, Mirrokni et al. 2018.) Prompts shorter than a page
have nothing to find again and go where the least is open. When one engine dies, all end: whoever restarts the server
gets all of them back.
"""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import msgspec

from octavo.engine.client.base import EngineClient, Sink
from octavo.errors import EngineDeadError
from octavo.protocol.control import Control, ControlReply, EngineInfo, EngineStats, GetInfo
from octavo.protocol.generate import GenerateRequest, TokenDelta

AFFINE_PAGES = 4  # a system prompt usually fills them; what follows may differ
SLACK = 1.25  # an engine may hold this many times its share before others are asked


class ReplicaClient:
    """Implements ``EngineClient`` over engines that are ready."""

    def __init__(self, clients: Sequence[EngineClient]) -> None:
        self.clients = list(clients)
        self.info = together([client.info for client in clients])
        self.open = [0] * len(self.clients)
        self._where: dict[int, int] = {}

    @property
    def alive(self) -> bool:
        """Whether all are."""
        return all(client.alive for client in self.clients)

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        """See ``EngineClient.submit``."""
        index = self.choose(request.prompt_token_ids)
        self.clients[index].submit(request, partial(self._deliver, sink))
        self._where[request.id] = index
        self.open[index] += 1

    def abort(self, ids: list[int]) -> None:
        """See ``EngineClient.abort``."""
        for index, client in enumerate(self.clients):
            mine = [id for id in ids if self._where.get(id) == index]
            for id in mine:
                self._forget(id)
            if mine:
                client.abort(mine)

    async def control(self, command: Control) -> ControlReply:
        """See ``EngineClient.control``; statistics are added up."""
        if isinstance(command, GetInfo):
            return self.info
        replies = await asyncio.gather(*(client.control(command) for client in self.clients))
        stats = [reply for reply in replies if isinstance(reply, EngineStats)]
        return add_up(stats) if stats else None

    async def close(self) -> None:
        """See ``EngineClient.close``."""
        await asyncio.gather(*(client.close() for client in self.clients))

    def choose(self, prompt: list[int]) -> int:
        """The engine for a prompt; raises ``EngineDeadError`` where one of them has died."""
        if not self.alive:
            raise EngineDeadError("One of the engines has stopped.", "Restart the server.")
        size = self.info.page_size
        if len(prompt) < size:
            return min(range(len(self.open)), key=lambda index: self.open[index])
        content = array("q", prompt[: AFFINE_PAGES * size]).tobytes()
        order = sorted(
            range(len(self.open)),
            key=lambda index: hashlib.blake2b(content, digest_size=8, salt=index.to_bytes(2, "big")).digest(),
        )
        most = SLACK * (sum(self.open) + 1) / len(self.open)
        return next((index for index in order if self.open[index] < most), order[0])

    def _deliver(self, sink: Sink, delta: TokenDelta) -> None:
        if delta.finish_reason is not None:
            self._forget(delta.id)
        sink(delta)

    def _forget(self, id: int) -> None:
        index = self._where.pop(id, None)
        if index is not None:
            self.open[index] -= 1


def together(infos: list[EngineInfo]) -> EngineInfo:
    """What all engines can do as one: sums of room, the least of limits on a single request."""
    return msgspec.structs.replace(
        infos[0],
        max_model_len=min(info.max_model_len for info in infos),
        max_num_seqs=sum(info.max_num_seqs for info in infos),
        max_queue_len=sum(info.max_queue_len for info in infos),
        num_pages=sum(info.num_pages for info in infos),
        device=f"{len(infos)} copies, each on {infos[0].device}",
    )


def add_up(stats: list[EngineStats]) -> EngineStats:
    """Sums, of lists entry by entry; the share of the cache in use is the mean, the size of a step the largest."""
    values: dict[str, Any] = {}
    for name in EngineStats.__struct_fields__:
        found = [getattr(each, name) for each in stats]
        lists = isinstance(found[0], list)
        values[name] = [sum(entries) for entries in zip_longest(*found, fillvalue=0)] if lists else sum(found)
    values["kv_cache_usage"] /= len(stats)
    values["step_tokens"] = max(each.step_tokens for each in stats)
    return EngineStats(**values)
