"""A Hugging Face model folder: config.json, safetensors weights (one file or shards), chat template.

Names that come from files in the folder are never trusted: every file opened must be a regular file that lies, after
symlinks, inside the folder (or inside the hub cache entry the folder is a snapshot of, whose files are links into
``blobs/``). ``auto_map`` and other keys that name code are data like any other: nothing of a model is executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.errors import ModelFileError
from octavo.files.base import TensorInfo
from octavo.files.jsonfile import parse_json
from octavo.files.mapped import MappedFile
from octavo.files.safetensors import SafetensorsFile

MAX_JSON_BYTES = 64 << 20
MAX_INDEX_BYTES = 100 << 20
MAX_SHARDS = 4096
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
AGAIN = "Download the model again."
# Of ModelOpt, GPTQ and AWQ, where config.json has no quantization_config.
QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


class ModelFolder:
    """File access that cannot leave one folder; raises ``ModelFileError``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        resolved = path.resolve()
        # hub cache: models--ORG--NAME/{blobs,snapshots/REVISION}; snapshot files are links to ../../blobs.
        is_snapshot = resolved.parent.name == "snapshots" and (resolved.parent.parent / "blobs").is_dir()
        self._root = resolved.parent.parent if is_snapshot else resolved

    def has(self, name: str) -> bool:
        """Whether something of that name is there."""
        return (self.path / name).exists()

    def locate(self, name: str, named_by: str) -> Path:
        """The checked path of file ``name``, which ``named_by`` asked for."""
        parts = PurePosixPath(name).parts
        # Backslashes, colons and NUL are separators or devices on some system; no weight file needs them.
        bad = not parts or name.startswith("/") or ".." in parts or any(c in name for c in "\\:\0")
        if bad:
            raise ModelFileError(f"{named_by} names {name!r}, which is outside the model folder.", AGAIN)
        path = self.path / name
        try:
            resolved = path.resolve(strict=True)
        except (OSError, RuntimeError):
            raise ModelFileError(f"{path}, named by {named_by}, is missing.", AGAIN) from None
        if not resolved.is_relative_to(self._root):
            raise ModelFileError(
                f"{path} is a link that leaves the model folder.", "Replace it by the file itself."
            )
        return path

    def names(self) -> list[str]:
        """What lies in the folder, in order."""
        return sorted(entry.name for entry in self.path.iterdir())

    def shard(self, name: str, named_by: str) -> SafetensorsFile:
        """The opened weight file ``name``."""
        return SafetensorsFile(self.locate(name, named_by))

    def read(self, name: str, max_bytes: int = MAX_JSON_BYTES) -> bytes:
        """The whole content of a small file."""
        file = MappedFile(self.locate(name, str(self.path)))
        try:
            if file.size > max_bytes:
                raise ModelFileError(f"{file.path} has {file.size} bytes, more than {max_bytes}.", AGAIN)
            return file.data[:]
        finally:
            file.close()

    def json(self, name: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
        """The JSON object in a file; {} where the file is absent."""
        if not self.has(name):
            return {}
        return parse_json(self.read(name, max_bytes), str(self.path / name), AGAIN)

    def config(self) -> dict[str, Any]:
        """config.json, which must be there."""
        if not self.has("config.json"):
            raise ModelFileError(
                f"{self.path} has no config.json.", "Give a Hugging Face model folder or a .gguf file."
            )
        return self.json("config.json")

    def chat_template(self) -> str | None:
        """The default chat template: chat_template.jinja, chat_template.json or tokenizer_config.json."""
        if self.has("chat_template.jinja"):
            try:
                return self.read("chat_template.jinja").decode()
            except UnicodeDecodeError:
                raise ModelFileError(
                    f"{self.path / 'chat_template.jinja'} is not UTF-8 text.", AGAIN
                ) from None
        for name in ("chat_template.json", "tokenizer_config.json"):
            template = self.json(name).get("chat_template")
            if template:
                return _default_template(template, self.path / name)
        return None


class FolderFiles:
    """An opened Hugging Face folder (see ``ModelFiles``)."""

    def __init__(self, path: Path, name: str | None = None, folder: ModelFolder | None = None) -> None:
        folder = folder or ModelFolder(path)
        self.path = path
        self.name = name or path.name
        self.format = "safetensors"
        self.config: Mapping[str, Any] = with_quantization(folder.config(), folder)
        self.generation_config: Mapping[str, Any] = folder.json("generation_config.json")
        self.chat_template: str | None = folder.chat_template()
        self._shards: list[SafetensorsFile] = []
        self._holder: dict[str, SafetensorsFile] = {}
        try:
            self._open_weights(folder)
        except BaseException:
            self.close()
            raise
        self.tensors: Mapping[str, TensorInfo] = {n: s.tensors[n] for n, s in self._holder.items()}

    def read(self, name: str) -> NDArray[np.uint8]:
        """The tensor's raw bytes: a flat uint8 view of the mapped shard (copies nothing)."""
        return self._holder[name].read(name)

    def close(self) -> None:
        """Unmap the shards."""
        for shard in self._shards:
            shard.close()

    def _open_weights(self, folder: ModelFolder) -> None:
        weight_map, named_by = _weight_map(folder)
        shards = sorted(set(weight_map.values())) if weight_map else _plain_shards(folder)
        for shard_name in shards:
            shard = folder.shard(shard_name, named_by)
            self._shards.append(shard)
            for tensor in shard.tensors:
                if weight_map and weight_map.get(tensor, shard_name) != shard_name:
                    continue  # the index takes this one from another shard
                if tensor in self._holder:
                    raise ModelFileError(
                        f"Tensor {tensor!r} is in {self._holder[tensor].path} and in {shard.path}.", AGAIN
                    )
                self._holder[tensor] = shard
        for tensor, shard_name in weight_map.items():
            if tensor not in self._holder:
                raise ModelFileError(
                    f"{named_by} expects tensor {tensor!r} in {shard_name}: it is not there.", AGAIN
                )


def with_quantization(config: dict[str, Any], folder: ModelFolder) -> dict[str, Any]:
    """config.json with what a quantizer wrote beside it, under the key that newer ones use."""
    if "quantization_config" in config:
        return config
    for name in QUANTIZATION_FILES:
        found = folder.json(name)
        if found:
            return {**config, "quantization_config": found}
    return config


def _weight_map(folder: ModelFolder) -> tuple[dict[str, str], str]:
    """Tensor name to shard from the index ({} without one), and who named the shards."""
    if folder.has("model.safetensors") or not folder.has("model.safetensors.index.json"):
        return {}, str(folder.path)
    where = str(folder.path / "model.safetensors.index.json")
    weight_map = folder.json("model.safetensors.index.json", MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{where} has no weight_map.", AGAIN)
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise ModelFileError(
                f"{where} names {shard!r} for {tensor!r}, which is no safetensors file.", AGAIN
            )
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise ModelFileError(f"{where} names more than {MAX_SHARDS} shards.", AGAIN)
    return weight_map, where


def _plain_shards(folder: ModelFolder) -> list[str]:
    """The safetensors files of a folder without an index, or the reason why there are none."""
    if folder.has("model.safetensors"):
        return ["model.safetensors"]
    names = folder.names()
    # consolidated*.safetensors hold the same weights once more, under the names of their maker.
    shards = [
        n for n in names if n.endswith(".safetensors") and not n.startswith(("consolidated", "adapter_"))
    ]
    if shards:
        return shards[:MAX_SHARDS]
    pickles = [n for n in names if n.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise ModelFileError(
            f"{folder.path} has its weights only as {pickles[0]}, a pickle, which can run any code when it is read.",
            'Convert it where you trust it: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder.path}').save_pretrained('{folder.path}-safetensors')\"",
        )
    raise ModelFileError(
        f"{folder.path} has no weights (*.safetensors).", "Download them, or use --load-format dummy."
    )


def _default_template(template: Any, where: Path) -> str:
    """The text of a chat template given as a string or as a list of named ones (the one named "default", or the first)."""
    if isinstance(template, str):
        return template
    named: dict[str, str] = {}
    for entry in template if isinstance(template, list) else [None]:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise ModelFileError(
                f"{where}: chat_template is neither a text nor a list of named texts.", AGAIN
            )
        named.setdefault(name, text)
    return named.get("default", next(iter(named.values())))
