"""Ranks on a real Ray cluster of two nodes on this machine, one CPU each. Skipped where Ray is not installed: it is too heavy
for the test extra (``pip install ray``, then ``pytest tests/distributed/test_ray.py``)."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import answers, options, whole
from service import answer_all, wait_gone

from octavo import host
from octavo.errors import EngineDeadError, UsageError
from octavo.host import raycluster
from octavo.host.raycluster import bundle_of, connect, told
from octavo.llm import LLM
from octavo.protocol.generate import GenerateRequest, SamplingParams

try:
    import ray
except ImportError:
    ray = None  # type: ignore[assignment]

needs_ray = pytest.mark.skipif(ray is None, reason="Ray is not installed (pip install ray)")
RAY = {"distributed_executor_backend": "ray"}


FAMILY = "qwen3"


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster with two nodes."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        patch.setenv("TEST_CLUSTER", str(os.getpid()))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        made = Cluster()
        for _ in range(2):
            made.add_node(num_cpus=1, object_store_memory=80 << 20, include_dashboard=False)
        patch.setenv("RAY_ADDRESS", made.address)
        yield made.address
        ray.shutdown()
        made.shutdown()


def free_cpus() -> float:
    """What nobody holds."""
    return float(ray.available_resources().get("CPU", 0))


def rank_processes() -> list[int]:
    """The workers on our cluster: those below Ray's actors are not below us, but have their environment."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            command, environment = (
                Path(f"/proc/{name}/{what}").read_bytes() for what in ("cmdline", "environ")
            )
        except OSError:
            continue
        if (
            b"octavo.engine.executor.worker" in command
            and f"TEST_CLUSTER={os.getpid()}".encode() in environment
        ):
            found.append(int(name))
    return found


@needs_ray
def test_ranks_on_two_nodes_answer_like_one_until_one_dies(model: str, cluster: str) -> None:
    before = set(rank_processes())
    expected = whole(model)
    with LLM(options(model, tensor_parallel_size=2, **RAY)) as llm:
        core = llm.client.core
        assert answers(core) == expected
        assert free_cpus() == 0
        workers = sorted(set(rank_processes()) - before)
        assert len(workers) == 2
        core.submit(
            GenerateRequest(
                id=9, prompt_token_ids=[5, 6, 7], sampling=SamplingParams(max_tokens=300, ignore_eos=True)
            )
        )
        core.step()
        os.kill(workers[1], signal.SIGKILL)
        with pytest.raises(EngineDeadError, match=r"Worker \d has ended with status -9"):
            while core.has_work:
                core.step()
        core.close()
    wait_gone(workers)
    assert not ray.is_initialized()  # it had joined the cluster, and left it


@needs_ray
def test_copies_get_ranks_of_their_own_and_a_full_cluster_says_so(
    model: str, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two engines in processes of their own, a rank each; a third finds no place; killed engines leave nobody."""
    before = set(rank_processes())
    prompts = [[3 + id] * (5 + 8 * id) for id in range(4)]
    asked = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    with LLM(options(model)) as llm:
        expected = [each.outputs[0].token_ids for each in llm.generate(prompts, asked, use_tqdm=False)]

    async def main() -> None:
        chosen = options(model, data_parallel_size=2, **RAY)
        client = host.connect(chosen, host.open_files(chosen))
        assert await asyncio.wait_for(answer_all(client, prompts), 60) == expected
        workers = list(set(rank_processes()) - before)
        assert len(workers) == 2
        monkeypatch.setattr(raycluster, "PLACE_S", 0.5)
        with pytest.raises(UsageError, match=r"no room for 1 ranks .1 CPU each. for 0.5 s: others use it"):
            host.build_core(options(model, **RAY), host.open_files(chosen))
        for one in getattr(client, "clients", []):
            os.kill(one.pid, signal.SIGKILL)
        wait_gone(workers)
        await client.close()

    asyncio.run(main())
    ray.init(address=cluster, log_to_driver=False)
    end = time.monotonic() + 20
    while free_cpus() < 2:
        assert time.monotonic() < end, "the places were not given back"
        time.sleep(0.1)
    ray.shutdown()


@needs_ray
def test_a_cluster_that_is_too_small_or_not_there(
    model: str, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = options(model, tensor_parallel_size=2, pipeline_parallel_size=2, **RAY)
    with pytest.raises(UsageError, match="The Ray cluster has 2 CPUs, but 4 ranks need 4"):
        host.build_core(chosen, host.open_files(chosen))
    assert not ray.is_initialized()
    for address, message in (
        ("127.0.0.1:1", "No Ray cluster can be reached: .* refused"),
        ("ray://127.0.0.1:10001", "that of Ray Client"),
    ):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UsageError, match=message):
            connect()


def test_without_ray_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"Ray, which is not installed.*octavo\[ray\]"):
        connect()


def test_what_a_rank_asks_of_the_cluster() -> None:
    four: Any = {"model": "x", "tensor_parallel_size": 4}
    bundle, chosen = bundle_of(options(**four, device="auto", threads=None), {"CPU": 8.0, "GPU": 4.0})
    assert (bundle, chosen.device.device) == ({"GPU": 1.0, "CPU": 1.0}, "cuda")
    bundle, chosen = bundle_of(options(**four, device="auto", threads=2), {"CPU": 8.0})
    assert (bundle, chosen.device.device, chosen.device.threads) == ({"CPU": 2.0}, "cpu", 2)
    with pytest.raises(UsageError, match="has 7 CPUs, but 4 ranks need 8"):
        bundle_of(options(**four, threads=2), {"CPU": 7.0})
    with pytest.raises(UsageError, match="has 2 GPUs, but 4 ranks need 4"):
        bundle_of(options(**four, device="cuda"), {"CPU": 8.0, "GPU": 2.0})
    assert told({"GPU": 2.0, "CPU": 0.5, "memory": 1.0}) == "2 GPU, 0.5 CPU"
