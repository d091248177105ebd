"""Starts the engines of ``--data-parallel-size``: a process each, on devices of its own. No torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace

from octavo.config import EngineOptions
from octavo.device.platform.machine import gpu_in_sight, usable_cores
from octavo.engine.client.messages import ProgressCall
from octavo.engine.client.replicas import ReplicaClient
from octavo.engine.client.socket import SocketClient
from octavo.errors import UsageError
from octavo.host.launch import ENGINE, likely_backend


def launch_replicas(
    options: EngineOptions,
    encode: Callable[[EngineOptions], bytes],
    progress: ProgressCall | None = None,
    cancel: threading.Event | None = None,
) -> ReplicaClient:
    """All engines at once; where one cannot start (or ``cancel`` is set), the others are stopped and its error is raised."""
    count = options.parallel.data_parallel_size
    one = replace(options, parallel=replace(options.parallel, data_parallel_size=1))
    device = options.device
    on_gpu = device.device == "cuda" or (device.device == "auto" and gpu_in_sight())
    if (
        options.parallel.distributed_executor_backend == "ray"
    ):  # which finds a place for every rank of every copy
        environments: list[dict[str, str]] = [{}] * count
    elif on_gpu:
        devices = deal_devices(options.parallel.ranks, count, os.environ.get("CUDA_VISIBLE_DEVICES"))
        environments = [{"CUDA_VISIBLE_DEVICES": names} for names in devices]
        one = replace(one, device=replace(device, device="cuda"))  # never a CPU where a GPU was meant
    else:
        environments = [{}] * count
        threads = device.threads or max(1, usable_cores() // count)
        one = replace(one, device=replace(device, threads=threads))
    cancel = cancel or threading.Event()
    encoded = encode(one)
    command = [*ENGINE, likely_backend(one)]

    def launch(index: int) -> SocketClient:
        report = progress if index == 0 else None
        return SocketClient.launch(
            command, encoded, report, environment={**os.environ, **environments[index]}, cancel=cancel
        )

    with ThreadPoolExecutor(count) as pool:
        starts = [pool.submit(launch, index) for index in range(count)]
        done, _ = wait(starts, return_when=FIRST_EXCEPTION)
        failed = next((start.exception() for start in done if start.exception() is not None), None)
        if failed is not None:
            cancel.set()
    if failed is not None:
        for start in starts:
            if start.exception() is None:
                start.result().kill()
        raise failed
    return ReplicaClient([start.result() for start in starts])


def deal_devices(each: int, count: int, visible: str | None) -> list[str]:
    """CUDA_VISIBLE_DEVICES of every copy: ``each`` of the devices that this process may see."""
    names = visible.split(",") if visible else [str(index) for index in range(each * count)]
    if len(names) < each * count:
        raise UsageError(
            f"{count} copies on {each} GPUs each need {each * count}, but CUDA_VISIBLE_DEVICES names {len(names)}.",
            "Choose a smaller --data-parallel-size.",
        )
    return [",".join(names[index * each : (index + 1) * each]) for index in range(count)]
