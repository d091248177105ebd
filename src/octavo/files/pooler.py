"""What a model folder says about turning its hidden states into one vector (sentence-transformers' files)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.files.folder import ModelFolder

MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
NAMES = {"cls": "cls", "mean": "mean", "lasttoken": "last", "last": "last"}
MAX_MODULES_BYTES = 1 << 20


@dataclass(frozen=True)
class PoolerAdvice:
    """None where nothing is said. ``max_length`` is the longest text in tokens that the makers trained on."""

    pooling: str | None = None
    normalize: bool | None = None
    max_length: int | None = None


def read_pooler(path: Path) -> PoolerAdvice:
    """Read modules.json and what it names; a folder without it (or a file) advises nothing.

    Raises ``ModelFileError`` for malformed files and ``UnsupportedModelError`` for a pooling that is not served.
    """
    if not path.is_dir():
        return PoolerAdvice()
    folder = ModelFolder(path)
    if not folder.has("modules.json"):
        return PoolerAdvice()
    pooling, normalize = None, False
    for module in _modules(folder):
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            pooling = _pooling(folder.json(f"{module.get('path')}/config.json"))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise UnsupportedModelError(f"{path}: modules.json names a module {kind!r}, which is not served.")
    length = folder.json("sentence_bert_config.json").get("max_seq_length")
    known = isinstance(length, int) and not isinstance(length, bool) and length > 1
    return PoolerAdvice(pooling, normalize, length if known else None)


def _modules(folder: ModelFolder) -> list[dict[str, Any]]:
    where = folder.path / "modules.json"
    try:
        modules = json.loads(folder.read("modules.json", MAX_MODULES_BYTES))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{where} is not valid JSON: {error}.") from None
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelFileError(f"{where} is no list of objects.")
    return modules


def _pooling(config: dict[str, Any]) -> str:
    named = config.get("pooling_mode")
    chosen = [name for key, name in MODES.items() if config.get(key) is True]
    if isinstance(named, str):
        chosen = [NAMES[named]] if named in NAMES else []
    if len(chosen) != 1:
        raise UnsupportedModelError(
            "The model pools in a way that is not served (served: cls, mean, last token)."
        )
    return chosen[0]
