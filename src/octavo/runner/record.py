"""Records a forward pass once for each size; shared by the decode and the mixed graphs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from octavo.device.platform.base import Platform
from octavo.model.batch import Batch
from octavo.model.face import AnyNetwork

Replays = dict[int, tuple[Callable[[], None], Tensor]]  # size -> (replay, the output it writes)


def record(
    network: AnyNetwork,
    platform: Platform,
    sizes: list[int],
    batch_of: Callable[[int], Batch],
    pool: object | None,
    done: Callable[[], None],
) -> tuple[Replays, object | None]:
    """Record ``network.forward(batch_of(size))`` for every size, largest first so that the shared pool is sized once.

    ``batch_of`` builds the batch from static memory and is part of the recording. Calls ``done`` after each. Returns
    the replays (none on a device without graphs) and the memory pool.
    """
    replays: Replays = {}
    for size in sorted(sizes, reverse=True):
        output: list[Tensor] = []

        def work(size: int = size, output: list[Tensor] = output) -> None:
            output[:] = [network.forward(batch_of(size))]

        work()  # compiles kernels outside the recording
        platform.synchronize()
        recorded = platform.capture(work, pool)
        if recorded is None:
            return replays, pool
        replay, pool = recorded
        replays[size] = (replay, output[0])
        done()
    return replays, pool
