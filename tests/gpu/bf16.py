"""How far bfloat16 on a device is from the float32 reference bodies, whose logits are transformers' own."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from harness import Driver
from torch import Tensor

from octavo.device.ops.bind import OpSpec
from octavo.files.resolve import open_model

LENGTHS = (70, 33, 18, 1)
DECODED = 12
# Most that a position's logits may be off, as a share of their length (both without their mean): at the median, and at nine
# tenths of all. The reference bodies themselves come to 0.5-1.3 % in bfloat16; with the gated delta rule they come to 2-4 %
# and 3-13 %, which is also what transformers' own bfloat16 model leaves (4 % and 10 % for qwen3_next).
BOUNDS = 0.02, 0.04
DELTA_BOUNDS = 0.06, 0.2
DELTA = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
RESULTS = Path(__file__).parent / "bf16_parity.json"


@dataclass(frozen=True)
class Distance:
    """Over all positions of a prefill, of chunks and of decodes: the median, and what nine tenths do not exceed."""

    median: float
    nine_tenths: float
    positions: int

    def is_near(self, family: str) -> bool:
        """Whether both are within the family's bounds."""
        median, nine_tenths = DELTA_BOUNDS if family in DELTA else BOUNDS
        return self.median <= median and self.nine_tenths <= nine_tenths

    def rounded(self) -> dict[str, float | int]:
        """For the file of results."""
        return {key: round(value, 4) for key, value in asdict(self).items()}


def distance(folder: Path, op_spec: OpSpec) -> Distance:
    """The checkpoint in bfloat16 on that device against itself in float32 on the CPU."""
    files = open_model(str(folder))
    rng = random.Random(5)
    sequences = [[rng.randrange(3, 256) for _ in range(length + DECODED)] for length in LENGTHS]
    wanted = logits(Driver(files, page=16), sequences)
    found = logits(
        Driver(files, dtype=torch.bfloat16, op_spec=op_spec, page=16, device=op_spec.device), sequences
    )
    off = torch.cat([relative(ours, theirs) for ours, theirs in zip(found, wanted)])
    return Distance(off.quantile(0.5).item(), off.quantile(0.9).item(), len(off))


def logits(driver: Driver, sequences: list[list[int]]) -> list[Tensor]:
    """Of every token, in the order of the steps: whole prompts but one, that in pieces beside decodes, then decodes."""
    rows = [driver.row() for _ in sequences]
    found = driver.step(rows[1:], [ids[:length] for ids, length in zip(sequences[1:], LENGTHS[1:])])
    first, at = sequences[0], 0
    while at < LENGTHS[0]:
        count = min(23, LENGTHS[0] - at)
        tokens = [first[at : at + count], *([ids[row.computed]] for ids, row in zip(sequences[1:], rows[1:]))]
        found += driver.step(rows, tokens)
        at += count
    while rows[1].computed < LENGTHS[1] + DECODED:
        found += driver.step(rows, [[ids[row.computed]] for ids, row in zip(sequences, rows)])
    return [part.cpu() for part in found]


def relative(ours: Tensor, theirs: Tensor) -> Tensor:
    """By position [n, V]: the length of the difference over that of what it should be, without their means."""
    ours, theirs = (part.double() - part.double().mean(1, keepdim=True) for part in (ours, theirs))
    return (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
