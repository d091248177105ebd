"""The rows of ``octavo bench table``: what is sent, what the peer reached on an H100, and what must be reached.

Peer: vLLM 0.26.0 with its defaults on one NVIDIA H100 80GB HBM3, random weights, context 8,192. A row's figure is output
tokens a second unless ``unit`` says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import msgspec

LLAMA, QWEN = "llama-3.1-8b", "qwen3-0.6b"
ITL_P99_MS = 80.0  # from 64 clients on: no answer waits behind a whole step of prompts


@dataclass(frozen=True)
class Load:
    """Requests of ``prompt`` tokens behind ``prefix`` shared ones, ``answer`` tokens each.

    ``concurrency`` clients in a closed loop; offline, how many sequences are one batch. ``full_count``: how many
    requests the peer's figure was taken over, where a row is cut short.
    """

    concurrency: int
    num_prompts: int
    prompt: int = 512
    answer: int = 128
    prefix: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    full_count: int = 0


@dataclass(frozen=True)
class Row:
    """One line of the table. Latencies are (p50, p99) in milliseconds; 0 = not known, or nothing to reach."""

    name: str
    load: Load
    peer: float
    must: float
    aim: float = 0.0
    unit: str = "tok/s"
    peer_ttft_ms: tuple[float, float] = (0.0, 0.0)
    peer_itl_ms: tuple[float, float] = (0.0, 0.0)
    must_itl_p99_ms: float = 0.0
    must_ttft_p50_ms: float = 0.0
    share_of: tuple[str, float] | None = None  # must reach this share of another row, where that has run

    @property
    def estimate_s(self) -> float:
        """Seconds it takes at the rate that must be reached."""
        load = self.load
        amount = load.num_prompts * (load.prompt if self.unit == "prompt tok/s" else load.answer)
        return (load.num_prompts if self.unit == "req/s" else amount) / self.must + 1.0


@dataclass(frozen=True)
class Stage:
    """Rows that share one engine. ``start``: the row of its start time, (name, peer, must) in seconds."""

    name: str
    kind: Literal["serve", "offline"]
    model: str
    rows: tuple[Row, ...]
    quantization: str | None = None
    start: tuple[str, float, float] | None = None
    flags: dict[str, str] = field(default_factory=lambda: {"max-model-len": "8192"})

    @property
    def start_estimate_s(self) -> float:
        """Seconds until it answers, at worst by the targets."""
        return self.start[2] if self.start else 20.0


class Order(msgspec.Struct):
    """What the process of an offline stage is asked for."""

    stage: Stage
    seed: int
    first_token_id: int
    num_token_ids: int


def _online(
    prefix: str,
    clients: int,
    num_prompts: int,
    peer: float,
    must: float,
    aim: float = 0.0,
    peer_ms: tuple[float, ...] = (),
) -> Row:
    """A closed loop; ``peer_ms``: the peer's TTFT p50, p99, ITL p50, p99, which then bind too."""
    row = Row(f"{prefix}/{clients}", Load(clients, num_prompts), peer, must, aim)
    if not peer_ms:
        return row
    first, first_p99, between, between_p99 = peer_ms
    binding = clients >= 64
    return replace(
        row,
        peer_ttft_ms=(first, first_p99),
        peer_itl_ms=(between, between_p99),
        must_ttft_p50_ms=first if binding else 0.0,
        must_itl_p99_ms=ITL_P99_MS if binding else 0.0,
    )


def _decode(prefix: str, peers: tuple[float, ...], musts: tuple[float, ...]) -> tuple[Row, ...]:
    return tuple(
        Row(f"{prefix}/decode-{batch}", Load(batch, batch, 32, 256), peer, must)
        for batch, peer, must in zip((1, 8, 32, 128, 256), peers, musts)
    )


def stages() -> tuple[Stage, ...]:
    """All stages in the order in which they run: what matters most comes first, time may run out."""
    online = (
        _online("8b", 1, 8, 150, 160, 185, peer_ms=(21, 37, 6.5, 9.4)),
        _online("8b", 8, 40, 1048, 1150, 1300, peer_ms=(94, 113, 6.8, 18)),
        _online("8b", 32, 128, 2950, 3200, 3700, peer_ms=(389, 453, 7.5, 27)),
        _online("8b", 64, 256, 4375, 4700, 5400, peer_ms=(472, 826, 8.6, 173)),
        _online("8b", 128, 384, 5430, 5800, 6600, peer_ms=(937, 1611, 10.7, 185)),
        _online("8b", 256, 768, 5775, 6200, 7200, peer_ms=(1800, 3250, 17.7, 200)),
    )
    sampled = Load(64, 256, temperature=1.0, top_p=0.95)
    others = (
        Row("8b/sampled-64", sampled, 4225, 4559, share_of=("8b/64", 0.97)),
        Row("8b/prefix-64", Load(64, 256, 64, 64, prefix=2048), 4365, 5000),
    )
    small = (
        _online("0.6b", 1, 24, 380, 700),
        _online("0.6b", 64, 512, 11270, 20000),
        _online("0.6b", 256, 1280, 10300, 28000),
    )
    fp8 = (
        _online("8b-fp8", 1, 10, 220, 260),
        _online("8b-fp8", 32, 128, 4084, 4600),
        _online("8b-fp8", 256, 768, 6725, 7600),
    )
    offline = (
        *_decode("8b", (152, 1209, 4566, 14686, 22379), (175, 1350, 5000, 16000, 24500)),
        Row("8b/prefill", Load(64, 64, 4096, 1, full_count=256), 41100, 43000, unit="prompt tok/s"),
        Row("8b/offline", Load(1000, 1000, 512, 128), 46, 52, unit="req/s"),
    )
    offline_fp8 = (
        *_decode("8b-fp8", (236, 1829, 6570, 19670, 28144), (236, 1829, 6570, 19670, 28144)),
        Row("8b-fp8/prefill", Load(64, 64, 4096, 1, full_count=256), 58000, 58000, unit="prompt tok/s"),
    )
    return (
        Stage("8b", "serve", LLAMA, online, start=("start/cold", 142, 30)),
        Stage("8b again", "serve", LLAMA, others, start=("start/second", 86, 15)),
        Stage("0.6b", "serve", QWEN, small),
        Stage("8b-fp8", "serve", LLAMA, fp8, "fp8"),
        Stage("8b offline", "offline", LLAMA, offline),
        Stage("8b-fp8 offline", "offline", LLAMA, offline_fp8, "fp8"),
    )
