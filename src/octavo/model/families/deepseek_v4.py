"""DeepSeek V4: compressed attention, hyper-connections, experts by token id in the first layers (DeepSeek-AI 2026)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.model.blocks import (
    CompressedAttention,
    Compressor,
    DecoderSpec,
    EntryIndexer,
    FeedForward,
    GatedMLP,
    HyperConnection,
    Layer,
    Linear,
    MoE,
    Part,
    Rope,
    Router,
    Scoring,
)
from octavo.model.decoder import Decoder
from octavo.model.read_arch import COMPRESSED_SPARSE, HEAVILY_COMPRESSED, SLIDING
from octavo.model.rope import build_rope

RATES = {COMPRESSED_SPARSE: 4, HEAVILY_COMPRESSED: 128}
SCORINGS: dict[str, Scoring] = {
    "sqrtsoftplus": "sqrt_softplus",
    "sigmoid": "sigmoid",
    "softmax": "softmax",
}


class DeepseekV4(Decoder):
    """Names are DeepSeek's own. Small or shared projections are the same on all tensor parallel ranks."""

    def spec(self) -> DecoderSpec:
        head = Linear(self.arch.hidden_size, (Part("head", "output", self.arch.vocab_size),), shard="column")
        return replace(
            super().spec(),
            head=None if self.arch.tie_embeddings else head,
            streams=replace(self.hyper("model.hc_head.hc_"), end=True, iterations=0),
            bare_prefix="model.",
            bare_names=(("embed_tokens.", "embed."), ("hc_head.hc_", "hc_head_")),
            ignored_prefixes=("model.mtp.",),
        )

    def layer(self, i: int) -> Layer:
        return Layer(
            input_norm=self.norm("attn_norm", "attn_norm"),
            attention=self.mixer(i),
            pre_mlp_norm=self.norm("ffn_norm", "ffn_norm"),
            mlp=self.mlp(i),
            hyper=(self.hyper("hc_attn_"), self.hyper("hc_ffn_")),
        )

    def hyper(self, prefix: str) -> HyperConnection:
        """The connection of one branch."""
        keys = self.keys
        fn, base, scale = (Part(f"{prefix}{name}", "", 0) for name in ("fn", "base", "scale"))
        return HyperConnection(
            fn,
            base,
            scale,
            streams=keys.integer("hc_mult", 4, most=16),
            hidden=self.arch.hidden_size,
            eps=keys.number("hc_eps", 1e-6),
            norm_eps=self.arch.norm_eps,
            iterations=keys.integer("hc_sinkhorn_iters", 20),
        )

    def mixer(self, i: int) -> CompressedAttention:
        a, keys, kind = self.arch, self.keys, self.arch.layer_types[i]
        rank, groups = keys.integer("q_lora_rank", 1024), keys.integer("o_groups", 8)
        inner = groups * keys.integer("o_lora_rank", 1024)
        if a.num_heads % groups:
            raise ModelFileError(f"config.json: {a.num_heads} heads do not divide into o_groups {groups}.")
        down = (Part("attn.wq_a", "attn_q_a", rank), Part("attn.wkv", "attn_kv", a.head_dim))
        grouped = [Part("attn.wo_a", "attn_output_a", inner)]
        return CompressedAttention(
            down=Linear(a.hidden_size, down),
            query_norm=self.norm("attn.q_norm", "attn_q_a_norm", rank),
            query=self.linear([Part("attn.wq_b", "attn_q_b", a.num_heads * a.head_dim)], rank),
            key_norm=self.norm("attn.norm", "attn_kv_norm", a.head_dim),
            grouped=self.linear(grouped, a.num_heads // groups * a.head_dim),
            output=self.linear([Part("attn.wo_b", "attn_output_b", a.hidden_size)], inner, row=True),
            sinks=Part("attn.attn_sink", "attn_sinks", a.num_heads),
            num_heads=a.num_heads,
            num_groups=groups,
            head_dim=a.head_dim,
            scale=a.head_dim**-0.5,
            rope=self.rope_parameters(i),
            window=keys.integer("sliding_window", 128),
            compressor=self.compressor("attn.compressor.", kind, a.head_dim) if kind in RATES else None,
            indexer=self.indexer(kind, rank) if kind == COMPRESSED_SPARSE else None,
        )

    def compressor(self, prefix: str, kind: str, size: int) -> Compressor:
        """Entries of ``size`` values; those of sparse layers overlap."""
        rates, short = self.keys.mapping("compress_rates"), kind == COMPRESSED_SPARSE
        old = self.keys.integer("compress_rate_csa" if short else "compress_rate_hca", RATES[kind])
        rate = rates.get(kind, old)
        if not isinstance(rate, int) or not 0 < rate <= 1024:
            raise ModelFileError(
                f"config.json: the compression rate of {kind} must be 1 to 1024, got {rate!r}."
            )
        width = size * (2 if short else 1)
        return Compressor(
            project=Linear(
                self.arch.hidden_size, (Part(f"{prefix}wkv", "", width), Part(f"{prefix}wgate", "", width))
            ),
            bias=Part(f"{prefix}ape", "", width),
            norm=self.norm(f"{prefix}norm", "", size),
            rate=rate,
            head_dim=size,
            overlap=short,
        )

    def indexer(self, kind: str, rank: int) -> EntryIndexer:
        """What chooses a sparse layer's entries."""
        keys, name = self.keys, "attn.indexer."
        heads, size = keys.integer("index_n_heads", 64), keys.integer("index_head_dim", 128)
        if size < self.rope_parameters(0).dim:
            raise UnsupportedModelError(f"config.json: index_head_dim {size} is too small to rotate.")
        return EntryIndexer(
            compressor=self.compressor(f"{name}compressor.", kind, size),
            query=Linear(rank, (Part(f"{name}wq_b", "", heads * size),)),
            weights=Linear(self.arch.hidden_size, (Part(f"{name}weights_proj", "", heads),)),
            num_heads=heads,
            top_k=keys.integer("index_topk", 512),
        )

    def rope_parameters(self, i: int) -> Rope:
        """Layers that look through the window alone have frequencies of their own."""
        a, keys = self.arch, self.keys
        label = "main" if a.layer_types[i] == SLIDING else "compress"
        given = keys.mapping("rope_parameters") or keys.mapping("rope_scaling")
        share = keys.number("partial_rotary_factor", keys.integer("qk_rope_head_dim", 64) / a.head_dim)
        found: dict[str, Any] = {"partial_rotary_factor": share}
        if isinstance(given.get(label), Mapping):
            found |= given[label]
        elif label == "main":
            found["rope_theta"] = keys.number("rope_theta", 10000.0)
        else:
            found |= {**given, "rope_theta": keys.number("compress_rope_theta", 160000.0)}
            found.setdefault("attention_factor", 1.0)  # yarn without its sharpening
        return build_rope(a.head_dim, found, a.max_position)

    def mlp(self, i: int) -> FeedForward:
        a, keys = self.arch, self.keys
        kinds = keys.source.get("mlp_layer_types")
        if kinds is not None and (not isinstance(kinds, list) or len(kinds) != a.num_layers):
            raise ModelFileError("config.json: mlp_layer_types must list one type a layer.")
        hashed = kinds[i] == "hash_moe" if kinds else i < keys.integer("num_hash_layers", 3, least=0)
        inner, limit = keys.integer("moe_intermediate_size"), keys.number("swiglu_limit", 10.0)
        experts = replace(
            self.experts(keys.integer("num_experts"), inner, "ffn.experts"), hf_each=("w1", "w3", "w2")
        )
        return MoE(self.choice(hashed), experts, limit=limit, shared=self.shared(inner, limit))

    def choice(self, hashed: bool) -> Router:
        """By scores, or by token id."""
        keys = self.keys
        name, top_k = (
            str(keys.source.get("scoring_func", "sqrtsoftplus")),
            keys.integer("num_experts_per_tok"),
        )
        if name not in SCORINGS:
            raise UnsupportedModelError(f"config.json: scoring_func {name!r} is not supported.")
        return replace(
            self.router(keys.integer("num_experts"), top_k, hf="ffn.gate"),
            scoring=SCORINGS[name],
            scale=keys.number("routed_scaling_factor", 1.5),
            correction="" if hashed else "ffn.gate.bias",
            table=Part("ffn.gate.tid2eid", "", self.arch.vocab_size) if hashed else None,
        )

    def shared(self, inner: int, limit: float) -> GatedMLP:
        """The experts that every token visits."""
        a = self.arch
        inner *= self.keys.integer("n_shared_experts", 1)
        gate, up, down = (f"ffn.shared_experts.w{number}" for number in (1, 3, 2))
        return GatedMLP(
            gate_up=self.linear([Part(gate, "", inner), Part(up, "", inner)], a.hidden_size),
            down=self.linear([Part(down, "", a.hidden_size)], inner, row=True),
            intermediate=inner,
            limit=limit,
        )


FAMILY = DeepseekV4
