"""The example manifests: they parse, and every flag in them is one of ``octavo serve``."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from octavo.api.server.options import ServerOptions
from octavo.cli.commands import parser_of
from octavo.cli.flags import collect, collect_engine

EXAMPLES = Path(__file__).parents[2] / "examples"
MANIFESTS = sorted((EXAMPLES / "kubernetes").glob("*.yaml"))


def containers(value: Any) -> Iterator[dict[str, Any]]:
    """Every container of a manifest, however deep."""
    if isinstance(value, dict):
        yield from value.get("containers", [])
        for inner in value.values():
            yield from containers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from containers(inner)


def check_flags(words: list[str]) -> None:
    """The words behind ``octavo serve`` are ones that it takes."""
    words = [re.sub(r"\$\(LWS_GROUP_SIZE\)", "2", word) for word in words]
    args = parser_of("serve").parse([re.sub(r"\$\([A-Z_]+\)", "1", word) for word in words])
    collect(args, ServerOptions).check()
    collect_engine(args)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifests(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text()))
    assert {"apiVersion", "kind", "metadata", "spec"} <= set.intersection(*map(set, documents))
    found = list(containers(documents))
    assert found
    for container in found:
        assert container["command"] == ["octavo", "serve"]
        check_flags(container["args"])
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {"keys", "models", "shm"}
    for probe in (found[0]["startupProbe"], found[0]["readinessProbe"]):
        assert probe["httpGet"] == {"path": "/health", "port": "http"}


def test_a_pod_has_time_to_finish_its_answers() -> None:
    (deployment, *_) = yaml.safe_load_all((EXAMPLES / "kubernetes" / "deployment.yaml").read_text())
    spec = deployment["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    drain = next(float(word.split("=")[1]) for word in container["args"] if "shutdown-timeout" in word)
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] > drain + pause


def test_the_ray_serve_application() -> None:
    """Its flags, and those of its usage lines (it runs where Ray Serve is installed, see docs/distributed.md)."""
    source = (EXAMPLES / "ray" / "serve_app.py").read_text()
    tree = ast.parse(source)
    (flags,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLAGS"
    )
    check_flags(shlex.split(flags))
    usage = re.findall(r'flags="([^"]+)"', ast.get_docstring(tree) or "")
    assert len(usage) == 2
    for line in usage:
        check_flags(shlex.split(line.replace("...", "model")))
