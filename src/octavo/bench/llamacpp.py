"""llama.cpp in this process, through the library of ``llama-cpp-python``: what Octavo's CPU path is compared with.

An optional package; build it for this processor, or the comparison is not one:

    CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_BLAS=OFF" pip install --no-binary llama-cpp-python llama-cpp-python
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.errors import OctavoError, UsageError

BATCH = 512  # tokens computed at a time, llama.cpp's own default


def load_library() -> Any:
    """The module; a ``UsageError`` with the command that installs it."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise UsageError(
            f"llama.cpp cannot be loaded: {error}.",
            'CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_BLAS=OFF" pip install --no-binary llama-cpp-python llama-cpp-python',
        ) from None
    return llama_cpp


class LlamaCpp:
    """One GGUF file in llama.cpp on ``threads`` threads; contexts are opened for a number of sequences."""

    def __init__(self, path: Path, threads: int) -> None:
        if path.suffix != ".gguf":
            raise UsageError(f"llama.cpp reads GGUF files, not {path}.", "Name a GGUF file.")
        self.library, self.threads = load_library(), threads
        self._quiet = self.library.llama_log_callback(lambda level, text, data: None)  # kept: C calls it
        self.library.llama_log_set(self._quiet, ctypes.c_void_p(0))
        options = self.library.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = self.library.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise OctavoError(f"llama.cpp cannot load {path}.")
        vocab = self.library.llama_model_get_vocab(self.model)
        self.vocab_size = int(self.library.llama_vocab_n_tokens(vocab))

    def describe(self) -> str:
        """Version and the instruction sets it was built with."""
        text = self.library.llama_print_system_info().decode()
        words = [part.split("=")[0].strip() for part in text.replace("CPU :", "").split("|") if "= 1" in part]
        return f"llama.cpp of llama-cpp-python {self.library.__version__} ({', '.join(words)})"

    def context(self, sequences: int, tokens: int) -> LlamaContext:
        """Room for ``sequences`` of ``tokens`` tokens each."""
        return LlamaContext(self, sequences, tokens)

    def close(self) -> None:
        """Free the weights."""
        if self.model:
            self.library.llama_model_free(self.model)
            self.model = None


class LlamaContext:
    """Key/value memory of some sequences and a batch to fill."""

    def __init__(self, engine: LlamaCpp, sequences: int, tokens: int) -> None:
        library = self.library = engine.library
        self.engine = engine
        options = library.llama_context_default_params()
        options.n_ctx = sequences * tokens
        options.n_batch = options.n_ubatch = max(BATCH, sequences)
        options.n_seq_max = sequences
        options.n_threads = options.n_threads_batch = engine.threads
        self.handle = library.llama_init_from_model(engine.model, options)
        if not self.handle:
            raise OctavoError(f"llama.cpp cannot open a context of {sequences} x {tokens} tokens.")
        self.batch = library.llama_batch_init(max(BATCH, sequences), 0, 1)
        self.fields = {
            name: np.ctypeslib.as_array(getattr(self.batch, name), (max(BATCH, sequences),))
            for name in ("token", "pos", "n_seq_id", "logits")
        }

    def clear(self) -> None:
        """Forget all sequences."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.handle), True)

    def decode(
        self, tokens: list[int], positions: list[int], sequences: list[int], wanted: list[bool]
    ) -> None:
        """Compute one token of each entry; logits exist afterwards where ``wanted``."""
        count = len(tokens)
        self.batch.n_tokens = count
        for name, values in (("token", tokens), ("pos", positions), ("logits", wanted)):
            self.fields[name][:count] = values
        self.fields["n_seq_id"][:count] = 1
        for index, sequence in enumerate(sequences):
            self.batch.seq_id[index][0] = sequence
        status = self.library.llama_decode(self.handle, self.batch)
        if status:
            raise OctavoError(f"llama_decode failed with status {status}.")

    def prefill(self, prompts: list[list[int]], first: int = 0) -> int:
        """Compute whole prompts as sequences ``first``.., BATCH tokens at a time; returns the last token's batch entry."""
        entries = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts, first)
            for position, token in enumerate(prompt)
        ]
        for start in range(0, len(entries), BATCH):
            tokens, positions, sequences, wanted = (list(x) for x in zip(*entries[start : start + BATCH]))
            self.decode(tokens, positions, sequences, wanted)
        return (len(entries) - 1) % BATCH

    def logits(self, index: int) -> NDArray[np.float32]:
        """Logits of batch entry ``index``: a view that the next ``decode`` overwrites."""
        row = self.library.llama_get_logits_ith(self.handle, index)
        return np.ctypeslib.as_array(row, (self.engine.vocab_size,))

    def close(self) -> None:
        """Free the memory."""
        if self.handle:
            self.library.llama_batch_free(self.batch)
            self.library.llama_free(self.handle)
            self.handle = None
