"""Facts about GPUs that are not here: memory as CUDA reports it, and compute capability. No torch."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from octavo.errors import UsageError

GIB = 1 << 30


@dataclass(frozen=True)
class GPU:
    """A kind of card. ``memory_gib`` is what CUDA reports (less than the name says: error correction and the driver
    take some), ``capability`` the compute capability x 10, 0 = not known (then everything is taken to be there)."""

    name: str
    memory_gib: float
    capability: int = 0

    @property
    def memory_bytes(self) -> int:
        """The same in bytes."""
        return int(self.memory_gib * GIB)


GPUS: tuple[GPU, ...] = (  # by memory
    GPU("RTX 3080 10GB", 9.77, 86),
    GPU("RTX 3060 12GB", 11.76, 86),
    GPU("L4", 22.03, 89),
    GPU("A10", 22.06, 86),
    GPU("RTX 4090", 23.64, 89),
    GPU("RTX 3090", 23.69, 86),
    GPU("RTX 5090", 31.36, 120),
    GPU("A100 40GB", 39.39, 80),
    GPU("L40S", 44.39, 89),
    GPU("H100", 79.10, 90),
    GPU("A100 80GB", 79.15, 80),
    GPU("H200", 139.80, 90),
    GPU("B200", 178.35, 100),
)


def find_gpu(name: str) -> GPU:
    """The card called so, however it is spelled ("rtx4090", "NVIDIA H100 80GB HBM3"); raises ``UsageError``."""
    wanted = _plain(name)
    found = [gpu for gpu in GPUS if wanted == _plain(gpu.name)]
    # "A100" could be either: the smaller one is the safe answer.
    found = found or [gpu for gpu in GPUS if wanted and _plain(gpu.name).startswith(wanted)]
    found = found or [gpu for gpu in reversed(GPUS) if _plain(gpu.name) in wanted]
    if found:
        return found[0]
    names = [gpu.name for gpu in GPUS]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(names)}."
    raise UsageError(f"--gpu {name!r} is not in the table.", f"{hint} Or give --gpu-memory-gib.")


def _plain(name: str) -> str:
    """Letters and digits of the part that tells cards apart."""
    text = "".join(c for c in name.lower() if c.isalnum())
    for word in ("nvidia", "geforce", "tesla", "rtx"):
        text = text.replace(word, "")
    return text
