"""Do the weights fit? Reckoned from the model's shape before a byte is allocated, with the cheapest cure where they do not."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from octavo.config import EngineOptions
from octavo.device.ops.bind import Binder
from octavo.device.platform.base import Platform
from octavo.errors import OutOfMemoryError
from octavo.model.network import Network

GIB = 1 << 30
LEAST_REST = 1 << 30  # bytes for a step and a small cache; a card that is full of weights serves nobody


def weight_bytes(make: Callable[[torch.device, Binder], Network]) -> int:
    """Bytes of all parameters: the network is built on torch's device without memory."""
    network = make(torch.device("meta"), Binder())
    targets = [item.target for item in network.items()]
    scales = [item.row_scale for item in network.items() if item.row_scale is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*targets, *scales])


def check_weights(needed: int, options: EngineOptions, platform: Platform, dtype: torch.dtype) -> None:
    """Raise ``OutOfMemoryError`` where ``needed`` bytes of weights and a little more exceed what may be used."""
    if platform.kind == "cpu":
        return
    hardware, free = platform.hardware(), platform.free_bytes()
    total, utilization = hardware.total_memory_bytes, options.cache.gpu_memory_utilization
    others = max(0, total - free)  # what is taken already, by other programs and the driver
    usable = int(total * utilization) - others
    want = needed + LEAST_REST
    if want <= usable:
        return
    raise OutOfMemoryError(
        f"The weights take {needed / GIB:.1f} GiB in {str(dtype).removeprefix('torch.')}; of {hardware.name}'s "
        f"{total / GIB:.1f} GiB, {usable / GIB:.1f} may be used (--gpu-memory-utilization {utilization:g}, "
        f"{others / GIB:.1f} GiB are taken already).",
        cheapest_cure(want, total, others, quantized=options.model.quantization is not None),
    )


def cheapest_cure(want: int, total: int, others: int, *, quantized: bool) -> str:
    """The least that would make ``want`` bytes fit: free memory, more of the card, fewer bits, more cards."""
    if want <= total - others - LEAST_REST:
        return f"Use --gpu-memory-utilization {math.ceil(100 * (want + others) / total) / 100:g}."
    if want <= 0.9 * total:
        return f"End the programs that hold {others / GIB:.1f} GiB of this card (nvidia-smi lists them)."
    if not quantized and want <= 1.8 * 0.9 * total:
        return "Use --quantization fp8, which halves the weights, or a quantized checkpoint."
    cards = 1 << math.ceil(math.log2(want / (0.9 * total)))
    return f"Use a smaller or a quantized model; unquantized it needs {cards} such cards."
