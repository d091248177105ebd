"""Octavo behind Ray Serve: replicas with an engine each, scaled and restarted by Ray (written for Ray 2.60).

    pip install 'octavo[ray]' 'ray[serve]'
    serve run serve_app:build flags="Qwen/Qwen3-8B --max-model-len 32768 --api-key-file /run/keys" gpus=1 replicas=2

``flags`` are those of ``octavo serve``; host and port are Ray Serve's. A model on several GPUs gets its ranks from the
cluster: flags="... -tp 4 --distributed-executor-backend ray" gpus=0.
"""

from __future__ import annotations

import asyncio
import shlex
from typing import Any

from ray import serve

from octavo.entrypoints.asgi import open_from_flags

# Without a key whoever reaches Ray Serve's port can use the model.
FLAGS = "smollm2:135m --max-model-len 4096 --allowed-hosts '*'"


@serve.deployment(
    max_ongoing_requests=1000,  # the engine batches and queues by itself, and answers 429 when its queue is full
    graceful_shutdown_timeout_s=60,
    health_check_period_s=5,
)
@serve.ingress()
class Octavo:
    """One engine and the API over it."""

    def __init__(self, flags: str) -> None:
        self.application, self.client = open_from_flags(shlex.split(flags))

    def __serve_build_asgi_app__(self) -> Any:
        return self.application

    def check_health(self) -> None:
        """Ray replaces a replica whose engine has died."""
        if not self.client.alive:
            raise RuntimeError("The engine has died.")

    async def __del__(self) -> None:
        await asyncio.shield(self.client.close())


def build(arguments: dict[str, str]) -> serve.Application:
    """What ``serve run`` calls with the NAME=VALUE words of its command line."""
    return Octavo.options(
        num_replicas=int(arguments.get("replicas", 1)),
        ray_actor_options={"num_gpus": float(arguments.get("gpus", 1))},
    ).bind(arguments.get("flags", FLAGS))
