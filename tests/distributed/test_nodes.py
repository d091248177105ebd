"""Two "machines" on the loopback: machine 0 has the engine, the other computes for it (gloo)."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from typing import Any

import pytest
from ranks import answers, free_port, options, whole
from service import descendants, wait_gone

from octavo import host
from octavo.engine.executor.multiproc import MultiprocExecutor
from octavo.engine.executor.node import NodeHello, accept_nodes, dial, listen
from octavo.errors import EngineDeadError, UsageError
from octavo.protocol.generate import GenerateRequest, SamplingParams

FAMILY = "llama"


def machine_one(model: str, shared: dict[str, Any]) -> subprocess.Popen[bytes]:
    """``octavo serve`` with the flags of machine 1."""
    flags = {**shared, "node_rank": 1, "device": "cpu", "dtype": "float32", "max_num_seqs": 8}
    flags |= {"max_num_batched_tokens": 32, "block_size": 4, "num_gpu_blocks_override": 512, "threads": 1}
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return subprocess.Popen([sys.executable, "-m", "octavo", "serve", model, *words])


def test_two_machines_answer_like_one_until_one_vanishes(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """(That they end together in order is seen in test_torchrun.py.)"""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    shared = {"tensor_parallel_size": 2, "nnodes": 2, "master_port": free_port()}
    other = machine_one(model, shared)
    try:
        chosen = options(model, **shared)
        core = host.build_core(chosen, host.open_files(chosen))
        workers = descendants(other.pid)
        assert len(workers) == 1
        assert answers(core) == whole(model)
        sampling = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
        core.submit(GenerateRequest(id=9, prompt_token_ids=[5, 6, 7], sampling=sampling))
        for _ in range(3):
            core.step()
        other.send_signal(signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="Worker 1 has ended with status unknown: the connection"):
            for _ in range(200):
                core.step()
        assert isinstance(core.executor, MultiprocExecutor)
        mine = core.executor.pids
        core.close()
        wait_gone([*workers, *mine])
    finally:
        other.kill()
        other.wait()


def test_a_port_in_use_is_refused_at_once(model: str) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port + 1)):
        chosen = options(model, tensor_parallel_size=2, nnodes=2, master_port=port)
        with pytest.raises(UsageError, match=rf"127.0.0.1:{port + 1} .* cannot be used"):
            host.build_core(chosen, host.open_files(chosen))


def test_other_machines_have_no_engine(model: str) -> None:
    chosen = options(model, tensor_parallel_size=2, nnodes=2, node_rank=1)
    with pytest.raises(UsageError, match="Only machine 0 has an engine"):
        host.build_core(chosen, host.open_files(chosen))


def test_machines_that_do_not_fit_or_come(model: str) -> None:
    def ready() -> None:
        """Nothing has failed here."""

    port = free_port()
    with pytest.raises(EngineDeadError, match=r"Machine 1, 2 of 3 did not dial within 0.3 s"):
        accept_nodes(listen("127.0.0.1", port), 2, "plan", ready, wait_s=0.3)
    with pytest.raises(EngineDeadError, match=f"Machine 0 does not answer at 127.0.0.1:{port}"):
        dial("127.0.0.1", port, NodeHello(1, [1], "plan"), 0.3)

    listener = listen("127.0.0.1", port)
    dialled: list[socket.socket] = []

    def strangers() -> None:
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        dialled.append(dial("127.0.0.1", port, NodeHello(1, [1], "other plan"), 5))

    thread = threading.Thread(target=strangers)
    thread.start()
    with pytest.raises(UsageError, match=r"Machine 1 was started with other flags \(other plan\)"):
        accept_nodes(listener, 1, "plan", ready, wait_s=10)
    thread.join()
    for connection in dialled:
        connection.close()
