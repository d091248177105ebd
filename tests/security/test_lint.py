"""Advisories that a look at the source answers: no unpickler, no evaluation, no listener that nobody asked for."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli_serve import CONFIG, ENGINE, TEMPLATE

SOURCE = Path(__file__).parents[2] / "src" / "octavo"
TREES = {path: ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")}
UNPICKLERS = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "jsonpickle",
}
# What unpickles inside: pyzmq's and multiprocessing's object messages, numpy's object arrays, torch's own files.
CALLS = {
    "recv_pyobj",
    "send_pyobj",
    "broadcast_object_list",
    "gather_object",
    "all_gather_object",
    "scatter_object_list",
}
EVALUATORS = {"eval", "exec", "compile", "__import__", "execfile", "literal_eval"}


def names(tree: ast.AST) -> list[tuple[str, int]]:
    """Every module that is imported anywhere, with its line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", node.lineno))
    return found


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_04_cve_2024_9052_no_unpickler_is_reachable() -> None:
    """Also rows 35 and 39: neither a plain one nor one with a list of what it may load."""
    for path, tree in TREES.items():
        for name, line in names(tree):
            assert name.split(".")[0] not in UNPICKLERS, f"{path}:{line}"
            assert "multiprocessing" not in name or "shared_memory" in name, (
                f"{path}:{line}: its queues unpickle"
            )
        for call in calls(tree):
            called = ast.unparse(call.func)
            assert called not in {"torch.load", "torch.save", "np.load", "numpy.load"}, (
                f"{path}:{call.lineno}"
            )
            assert called.rsplit(".", 1)[-1] not in CALLS, f"{path}:{call.lineno}"
            assert all(keyword.arg != "allow_pickle" for keyword in call.keywords), f"{path}:{call.lineno}"


def test_11_cve_2026_27893_nobody_trusts_remote_code() -> None:
    for path, tree in TREES.items():
        for call in calls(tree):
            assert all(keyword.arg != "trust_remote_code" for keyword in call.keywords), (
                f"{path}:{call.lineno}"
            )
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert node.attr not in {"get_class_from_dynamic_module", "register_for_auto_class"}, path


def test_14_cve_2026_41523_no_check_is_an_assertion() -> None:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}: gone under python -O"


def test_14_the_front_refuses_under_optimization() -> None:
    """The same refusals with ``python -O``."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from server_fake import FakeEngine, make_client\n"
        "client = make_client(FakeEngine(), api_keys=('k',))\n"
        "head = {'authorization': 'Bearer k'}\n"
        "post = lambda body, **h: client.post('/v1/completions', json=body, headers=h).status_code\n"
        "print(post({'prompt': 'x'}), post({'prompt': [-1]}, **head), post({'prompt': 'x', 'n': 999}, **head))\n"
    )
    room = str(Path(__file__).parents[1] / "server")
    done = subprocess.run(
        [sys.executable, "-O", "-c", code, room], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["401", "400", "400"]


def test_25b_cve_2025_9141_nothing_is_evaluated() -> None:
    for path, tree in TREES.items():
        for call in calls(tree):
            assert ast.unparse(call.func) not in EVALUATORS, f"{path}:{call.lineno}"


def test_35_cve_2026_3059_sockets_are_unix_or_asked_for() -> None:
    """Also row 50: the source binds nothing on the network but the address that the user names."""
    binds = []
    for path, tree in TREES.items():
        for call in calls(tree):
            if ast.unparse(call.func).endswith(".bind") and isinstance(call.func, ast.Attribute):
                binds.append((path.relative_to(SOURCE).as_posix(), ast.unparse(call)))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.search(r"tcp://(\*|0\.0\.0\.0|\[::\])", node.value), path
    allowed = {
        "api/server/listen.py": r"listener\.bind\((address|path)\)",  # what the user names
        "engine/client/channel.py": r"\.bind\(f'\{(self|pipe)\.address\}/",  # an ipc:// folder of mode 0700
        "engine/client/serve.py": r"\.bind\(f'\{address\}/",  # the same folder
        "host/raycluster.py": r"probe\.bind\(\('', 0\)\)",  # closed at once: asks for a free port
    }
    others = {
        (path, text)
        for path, text in binds
        if path.startswith(("api/", "engine/", "cli/", "host/"))
        and "binder" not in text
        and not re.search(allowed.get(path, r"\Z\A"), text)
    }
    assert not others, others
    assert {path for path, _ in binds} >= set(allowed), "the list is out of date"
    assert 'f"ipc://{folder}"' in (SOURCE / "engine/client/channel.py").read_text()


def test_47_cve_2026_42248_there_is_no_updater() -> None:
    """Nothing installs or downloads code: pip is only asked for pinned archives of models, by digest."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.search(r"\bpip install -U|--upgrade\b", node.value), path


def listening(pids: set[int]) -> set[tuple[str, int]]:
    """TCP addresses that processes listen on, out of /proc."""
    inodes = set()
    for pid in pids:
        try:
            for link in Path(f"/proc/{pid}/fd").iterdir():
                target = os.readlink(link)
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
        except OSError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                host, port = fields[1].split(":")
                found.add((host, int(port, 16)))
    return found


def family(pid: int) -> set[int]:
    """A process and all that come from it."""
    found = {pid}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found |= family(int(child))
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs /proc")
def test_06_cve_2025_30202_one_listener_on_the_asked_address(tmp_path: Path) -> None:
    """Also row 50: server and engine as a user starts them listen on one loopback port and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    command = [sys.executable, "-m", "octavo", "serve", str(tmp_path), *ENGINE, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
        assert address is not None
        pids = family(process.pid)
        assert len(pids) >= 2  # the engine is a process of its own
        assert listening(pids) == {("0100007F", int(address[1]))}
    finally:
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
