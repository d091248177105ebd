"""The headers of a hub model, by range requests: configuration, tensor names, shapes and types, but no weights.

config.json, index      whole, small
model-*.safetensors     8 bytes of length + the JSON header, in one or two requests a shard
*.gguf                  the beginning, four times as much until metadata and tensor table are in it
"""

from __future__ import annotations

import re
import struct
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from octavo.errors import ModelFileError
from octavo.files.base import ModelFiles
from octavo.files.folder import MAX_JSON_BYTES, FolderFiles, ModelFolder
from octavo.files.gguf import GGUFFile
from octavo.files.hub import explain, parse_hub_name, pick_gguf
from octavo.files.mapped import RemoteHead
from octavo.files.safetensors import MAX_HEADER_BYTES, SafetensorsFile

FIRST_BYTES = 256 << 10  # holds the header of nearly every shard
MAX_GGUF_HEAD = 256 << 20
GROWTH = 4


class Repository:
    """A model repository on the hub; only ``huggingface_hub``'s own client, login and mirror settings are used."""

    def __init__(self, repo: str, revision: str | None = None, endpoint: str | None = None) -> None:
        try:
            import huggingface_hub
        except ImportError:
            raise ModelFileError(
                "Hub models need the package huggingface-hub.",
                "Install it, or give a local folder or .gguf file.",
            ) from None
        self.hub: Any = huggingface_hub
        self.repo = repo
        self.revision = revision
        self.endpoint = endpoint
        info = self._asked(
            partial(huggingface_hub.HfApi(endpoint=endpoint).model_info, repo, revision=revision or "main")
        )
        self.commit = str(info.sha)
        self.files = sorted(sibling.rfilename for sibling in info.siblings or [])

    def fetch(self, name: str, start: int, stop: int) -> tuple[bytes, int]:
        """Bytes [start, stop) of a file (fewer at its end), and the size of the whole file."""
        found: tuple[bytes, int] = self._asked(partial(self._fetch, name, start, stop))
        return found

    def head(self, name: str, nbytes: int) -> RemoteHead:
        """The beginning of a file."""
        data, size = self.fetch(name, 0, nbytes)
        path = Path(self.repo) / name
        return RemoteHead(path, size, data, lambda start, stop: self.fetch(name, start, stop)[0])

    def _fetch(self, name: str, start: int, stop: int) -> tuple[bytes, int]:
        utils = self.hub.utils
        url = self.hub.hf_hub_url(self.repo, name, revision=self.commit, endpoint=self.endpoint)
        headers = {
            **utils.build_hf_headers(),
            "Range": f"bytes={start}-{stop - 1}",
            "Accept-Encoding": "identity",
        }
        with utils.get_session().stream("GET", url, headers=headers, follow_redirects=True) as answer:
            utils.hf_raise_for_status(answer)
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
            partial_answer = answer.status_code == 206 and found is not None and int(found[1]) == start
            size = int(found[2]) if found else int(answer.headers.get("Content-Length", 0))
            skip = 0 if partial_answer else start  # a server that knows no ranges sends everything
            data = bytearray()
            for piece in answer.iter_bytes():
                data += piece
                if len(data) >= skip + stop - start:
                    break
        return bytes(data[skip : skip + stop - start]), size

    def _asked(self, question: Any) -> Any:
        """The answer, or the library's error as one sentence."""
        try:
            return question()
        except Exception as error:
            explained = explain(error, self.repo, self.revision)
            if explained is None:
                raise
            raise explained from None


class RemoteFolder(ModelFolder):
    """A repository as a model folder of which only small files and headers are read."""

    def __init__(self, repository: Repository) -> None:
        self.path = Path(repository.repo)
        self.repository = repository

    def has(self, name: str) -> bool:
        """See ``ModelFolder``."""
        return name in self.repository.files

    def names(self) -> list[str]:
        """See ``ModelFolder``."""
        return [name for name in self.repository.files if "/" not in name]

    def read(self, name: str, max_bytes: int = MAX_JSON_BYTES) -> bytes:
        """See ``ModelFolder``."""
        data, size = self.repository.fetch(name, 0, max_bytes)
        if size > max_bytes:
            raise ModelFileError(f"{self.path / name} has {size} bytes, more than {max_bytes}.")
        return data

    def shard(self, name: str, named_by: str) -> SafetensorsFile:
        """See ``ModelFolder``; the header alone."""
        if name not in self.repository.files:
            raise ModelFileError(f"{self.path / name}, named by {named_by}, is not on the hub.")
        head = self.repository.head(name, FIRST_BYTES)
        if len(head.data) >= 8:
            needed = 8 + int(struct.unpack_from("<Q", head.data, 0)[0])
            if len(head.data) < needed <= min(head.size, 8 + MAX_HEADER_BYTES):
                head.data = head.data[:] + head.fetch(len(head.data), needed)
        return SafetensorsFile(self.path / name, head)


def open_headers(name: str, revision: str | None = None, endpoint: str | None = None) -> ModelFiles:
    """The model "org/name" or "org/name:QUANT" of the hub without its weights.

    Raises ``ModelFileError`` or ``ModelNotFoundError``.
    """
    parsed = parse_hub_name(name)
    if parsed is None:
        raise ModelFileError(f"{name!r} is no hub id.", "Hub ids look like org/name or org/name:Q4_K_M.")
    repo, quantization = parsed
    repository = Repository(repo, revision, endpoint)
    if quantization is None:
        folder = RemoteFolder(repository)
        return FolderFiles(folder.path, name, folder)
    paths = [PurePosixPath(file) for file in repository.files if file.endswith(".gguf")]
    chosen = pick_gguf(paths, name, quantization)
    if chosen is None:
        raise ModelFileError(
            f"{repo} on the hub has no .gguf file with {quantization} in its name.",
            f"It has: {', '.join(path.name for path in paths[:8]) or 'none at all'}.",
        )
    return _open_gguf(repository, str(chosen), name)


def _open_gguf(repository: Repository, file: str, name: str) -> GGUFFile:
    head = repository.head(file, GROWTH * FIRST_BYTES)
    while True:
        try:
            return GGUFFile(head.path, name, head)
        # Cut anywhere, the head looks damaged in one way or another.
        except (ModelFileError, struct.error, ValueError, IndexError) as error:
            known = len(head.data)
            if known >= min(head.size, MAX_GGUF_HEAD):
                if isinstance(error, ModelFileError):
                    raise
                raise ModelFileError(f"{head.path}: the header is damaged.") from None
            head.data = head.data[:] + head.fetch(known, min(head.size, known * GROWTH, MAX_GGUF_HEAD))
