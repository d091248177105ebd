"""The rates of this device and the proofs that come before any figure: ``python -m octavo.bench.table_check [--rates]``.

A model of Llama-3.1-8B's widths with fewer layers and random bf16 weights is run by the real runner, with plans written
by hand. Every error is ``|ours - theirs| / |theirs|`` over the logits of all rows (Frobenius). The yardstick is
``noise``: the error of the reference in bfloat16 against the same reference in float32. The reference is transformers
where it is importable, else our own reference bodies.

    pages      the same step over scattered and over consecutive pages: equal to the bit
    graph      a recorded step against the same step launched kernel by kernel   at most 2 x noise
    batch      a row alone against the same row of 64                            at most 2 x noise
    chunks     a prompt in pieces, mixed with decodes, against it whole          at most 2 x noise
    reference  against the reference in float32                                  at most 1.5 x noise
"""

from __future__ import annotations

import json
import platform
import random
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from octavo import host
from octavo.bench.gpu import ceilings, fp8_ceiling
from octavo.config import EngineOptions
from octavo.device.ops.bind import Binder
from octavo.device.platform.select import open_platform
from octavo.engine.cache.spec import ceil_div
from octavo.files.dummy import LLAMA_3_1_8B, open_dummy
from octavo.host.torch_engine import DTYPES
from octavo.protocol.generate import SamplingParams
from octavo.protocol.plan import PageWrite, SlotInit, StepPlan
from octavo.runner.runner import TorchRunner

NUM_LAYERS = 4
NUM_ROWS = 64
PAGES = 4096
BOUNDS = {"pages": 0.0, "graph": 2.0, "batch": 2.0, "chunks": 2.0, "reference": 1.5}  # times noise


@dataclass(frozen=True)
class Finding:
    """One proof: its error and the most it may be."""

    name: str
    error: float
    bound: float
    note: str = ""

    @property
    def holds(self) -> bool:
        """False too where the error is no number."""
        return self.error <= self.bound


class Prober:
    """Runs prompts through a runner and reads the logits of the token after each."""

    def __init__(self, runner: TorchRunner, prompts: list[list[int]]) -> None:
        self.runner = runner
        self.prompts = prompts
        self.last = [prompt[-1] for prompt in prompts]
        self.number = 0

    def logits(
        self, rows: list[int], *, scattered: bool = False, graphs: bool = True, pieces: int = 1
    ) -> Tensor:
        """[rows, V] float32: the prompts but their last token as prompt steps, the last one as a decode step."""
        runner = self.runner
        kept, runner.graphs = runner.graphs, runner.graphs if graphs else None
        try:
            self._admit(rows, scattered)
            slots = list(range(len(rows)))
            lengths = [len(self.prompts[row]) - 1 for row in rows]
            for piece in range(pieces):
                starts = [length * piece // pieces for length in lengths]
                counts = [length * (piece + 1) // pieces - start for length, start in zip(lengths, starts)]
                self._step(slots, starts, counts, last=piece == pieces - 1)
            # What the prompt step drew is replaced: every way decodes the same token.
            wanted = torch.tensor([self.last[row] for row in rows], device=runner.platform.device)
            with torch.inference_mode():
                runner.slots.last_token[: len(rows)] = wanted
            return self._step(slots, lengths, [1] * len(rows), last=True)
        finally:
            runner.graphs = kept

    def _admit(self, rows: list[int], scattered: bool) -> None:
        """Slots and pages; ``scattered`` gives them in random order."""
        order = list(range(1, PAGES))
        if scattered:
            random.Random(1).shuffle(order)
        sampling = SamplingParams(temperature=0.0)
        admits, writes, used = [], [], 0
        for slot, row in enumerate(rows):
            prompt = self.prompts[row][:-1]
            admits.append(SlotInit(slot, prompt, len(prompt), sampling, slot, []))
            for index, group in enumerate(self.runner.layout.groups):
                count = ceil_div(len(prompt) + 1, group.spec.page_size)
                writes.append(PageWrite(index, slot, 0, order[used : used + count]))
                used += count
        self.waiting = (admits, writes)

    def _step(self, slots: list[int], starts: list[int], counts: list[int], last: bool) -> Tensor:
        self.number += 1
        admits, writes = self.waiting
        self.waiting = ([], [])
        plan = StepPlan(
            self.number, slots, starts, counts, [0] * len(slots), [last] * len(slots), admits, writes, []
        )
        runner = self.runner
        runner.forward(plan)
        if runner.current is None:
            raise RuntimeError("the runner kept no step")
        with torch.inference_mode():
            hidden = runner.current[2]
            logits = runner.network.logits(hidden[: len(slots)]).float().clone()
        runner.sample([])
        runner.collect()
        return logits


def build_runner(config: Mapping[str, Any]) -> TorchRunner:
    """A small engine of these widths on this device, graphs included."""
    options = EngineOptions.of(
        model="llama-3.1-8b",
        load_format="dummy",
        max_model_len="2048",
        max_num_seqs=NUM_ROWS,
        max_num_batched_tokens=8192,
        num_gpu_blocks_override=PAGES,
        dtype="bfloat16",
        cpu_backend="torch",
    )
    runner = host.build_runner(options, open_dummy(config)).runner
    if not isinstance(runner, TorchRunner):
        raise TypeError("the proofs drive the torch runner")
    return runner


def some_prompts(count: int, vocab_size: int) -> list[list[int]]:
    """Prompts of 2 to 400 tokens."""
    rng = random.Random(0)
    return [[rng.randrange(vocab_size) for _ in range(rng.randint(2, 400))] for _ in range(count)]


def transformers_logits(
    runner: TorchRunner, config: Mapping[str, Any], prompts: list[list[int]], dtype: torch.dtype
) -> Tensor:
    """The same weights in transformers; raises ``ImportError`` where that is not installed."""
    import transformers

    network, device = runner.network, runner.platform.device
    chosen = transformers.LlamaConfig(**{k: v for k, v in config.items() if k != "torch_dtype"})
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(chosen)
    state = {item.hf: item.target.to(dtype) for item in network.items()}
    model = model.to_empty(device=device).to(dtype).eval()
    model.load_state_dict(state, strict=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(chosen).to(device)
    with torch.inference_mode():
        answers = [
            model(torch.tensor([prompt], device=device), logits_to_keep=1).logits for prompt in prompts
        ]
    return torch.stack([logits[0, -1].float() for logits in answers])


def own_logits(runner: TorchRunner, prompts: list[list[int]], dtype: torch.dtype) -> Tensor:
    """The same weights through the reference bodies of our own ops, over pages of their own."""
    binder = Binder(forced=dict.fromkeys(("linear", "rms_norm", "add_rms_norm", "act_mul"), "none"))
    binder.forced |= dict.fromkeys(("rope_store", "paged_attention"), "none")
    network = runner.network
    again: Any = type(network)
    plain = again(
        network.spec,
        dtype=dtype,
        device=runner.platform.device,
        binder=binder,
        op_spec=runner.platform.op_spec(dtype),
        max_position=2048,
    )
    with torch.inference_mode():
        for mine, theirs in zip(plain.items(), network.items()):
            mine.target.copy_(theirs.target)
    wider = dtype.itemsize // torch.bfloat16.itemsize
    plain.bind_cache(
        {
            layer: replace(place, raw=place.raw.new_zeros(PAGES, wider * place.raw.shape[1]))
            for layer, place in runner.pages.places.items()
        }
    )
    kept, runner.network = runner.network, plain
    try:
        prober = Prober(runner, prompts)
        return torch.cat([prober.logits([row], graphs=False) for row in range(len(prompts))])
    finally:
        runner.network = kept


def references(
    runner: TorchRunner, config: Mapping[str, Any], prompts: list[list[int]]
) -> tuple[str, Tensor, Tensor]:
    """(what it is, float32 logits, bfloat16 logits) of the reference."""
    try:
        wide, narrow = (
            transformers_logits(runner, config, prompts, DTYPES[name]) for name in ("float32", "bfloat16")
        )
        return "transformers", wide, narrow
    except ImportError:
        wide, narrow = (own_logits(runner, prompts, DTYPES[name]) for name in ("float32", "bfloat16"))
        return "reference bodies (transformers is not installed)", wide, narrow


def error(ours: Tensor, theirs: Tensor) -> float:
    """Relative error over all values."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def prove(config: Mapping[str, Any], num_rows: int = NUM_ROWS) -> list[Finding]:
    """All proofs on one small model."""
    torch.backends.cuda.matmul.allow_tf32 = False
    runner = build_runner(config)
    prompts = some_prompts(num_rows, int(config["vocab_size"]))
    prober = Prober(runner, prompts)
    every = list(range(num_rows))
    alone = sorted({0, num_rows // 3, num_rows - 1})
    name, wide, narrow = references(runner, config, prompts)
    noise = error(narrow, wide)
    together = prober.logits(every)
    found = {
        "pages": error(prober.logits(every, scattered=True), together),
        "graph": error(prober.logits(every, graphs=False), together),
        "batch": error(torch.cat([prober.logits([row]) for row in alone]), together[alone]),
        "chunks": error(prober.logits(every, pieces=3), together),
        "reference": error(together, wide),
    }
    notes = {"reference": f"{name}; its own bf16 noise {noise:.5f}"}
    return [Finding(key, value, BOUNDS[key] * noise, notes.get(key, "")) for key, value in found.items()]


def rates() -> dict[str, Any]:
    """Device, versions and rates; a device without fp8 arithmetic has rate 0 there."""
    device = open_platform("cuda")
    copy, bf16 = ceilings(device.device)
    fp8 = fp8_ceiling(device.device) if torch.cuda.get_device_capability() >= (8, 9) else 0.0
    return {
        "device": device.hardware().name,
        "copy": copy,
        "bf16": bf16,
        "fp8": fp8,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main(argv: list[str]) -> int:
    """Print the rates and, without --rates, every finding, as lines of JSON."""
    if not torch.cuda.is_available():
        print("There is no CUDA device here; run this on a machine with an NVIDIA GPU.", file=sys.stderr)
        return 2
    print(json.dumps({"rates": rates()}), flush=True)
    if "--rates" not in argv:
        config = {**LLAMA_3_1_8B, "num_hidden_layers": NUM_LAYERS}
        for finding in prove(config):
            print(json.dumps({"finding": asdict(finding), "holds": finding.holds}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
