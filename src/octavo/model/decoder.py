"""The shape every decoder-only family shares; a family states only what differs (rule R4). No torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.model.arch import ArchConfig
from octavo.model.blocks import (
    Attention,
    DecoderSpec,
    Embedding,
    Experts,
    FeedForward,
    GatedMLP,
    Layer,
    Linear,
    Mixer,
    MoE,
    Norm,
    Part,
    PlainMLP,
    Rope,
    Router,
)
from octavo.model.keys import Keys
from octavo.model.rope import build_rope


class Decoder:
    """Llama's shape: pre-norm attention and gated MLP. Subclasses override the pieces that differ."""

    qk_norm = False
    norm_offset = 0.0
    norm_kind: Literal["rms", "layer"] = "rms"
    norm_bias = False
    gguf_permuted_rope = False  # GGUF stores q and k with interleaved rotary pairs
    hf_permuted_rope = False  # so do Hugging Face checkpoints

    def __init__(self, arch: ArchConfig) -> None:
        self.arch = arch
        self.keys = Keys(arch.raw, "config.json")  # what only one family knows

    def spec(self) -> DecoderSpec:
        """The whole model as blocks."""
        a = self.arch
        return DecoderSpec(
            embedding=self.embedding(),
            layers=tuple(self.layer(i) for i in range(a.num_layers)),
            norm=self.norm("model.norm", "output_norm"),
            head=None
            if a.tie_embeddings
            else self.linear([Part("lm_head", "output", a.vocab_size)], a.hidden_size),
            logit_softcap=a.logit_softcap,
        )

    def embedding(self) -> Embedding:
        """Token embedding."""
        return Embedding("model.embed_tokens", "token_embd", self.arch.vocab_size, self.arch.hidden_size)

    def layer(self, i: int) -> Layer:
        """Layer i."""
        return Layer(
            input_norm=self.norm("input_layernorm", "attn_norm"),
            attention=self.mixer(i),
            pre_mlp_norm=self.norm("post_attention_layernorm", "ffn_norm"),
            mlp=self.mlp(i),
        )

    def sandwich_layer(self, i: int) -> Layer:
        """Layer i with norms before and after both branches (Gemma 2 and later)."""
        return Layer(
            input_norm=self.norm("input_layernorm", "attn_norm"),
            attention=self.mixer(i),
            post_attention_norm=self.norm("post_attention_layernorm", "post_attention_norm"),
            pre_mlp_norm=self.norm("pre_feedforward_layernorm", "ffn_norm"),
            mlp=self.mlp(i),
            post_mlp_norm=self.norm("post_feedforward_layernorm", "post_ffw_norm"),
        )

    def post_norm_layer(self, i: int) -> Layer:
        """Layer i with a norm after each branch and none before it (OLMo 2)."""
        layer = self.sandwich_layer(i)
        return replace(layer, input_norm=None, pre_mlp_norm=None)

    def norm(self, hf: str, gguf: str, size: int | None = None) -> Norm:
        """A norm of the family's kind over the hidden size or over ``size`` values."""
        return Norm(
            hf,
            gguf,
            size or self.arch.hidden_size,
            self.arch.norm_eps,
            self.norm_offset,
            self.norm_kind,
            self.norm_bias,
        )

    def linear(self, parts: list[Part], in_features: int, *, bias: bool = False, row: bool = False) -> Linear:
        """A projection, split by columns under tensor parallelism unless ``row``."""
        return Linear(in_features, tuple(parts), bias, "row" if row else "column")

    def slices(self, whole: Part, sizes: list[int]) -> list[Part]:
        """Consecutive parts of one stored tensor; ``whole`` names it."""
        return [
            replace(whole, out_features=size, start=sum(sizes[:index]), total=sum(sizes))
            for index, size in enumerate(sizes)
        ]

    def mixer(self, i: int) -> Mixer:
        """What mixes layer i's tokens with those before them."""
        return self.attention(i)

    def attention(self, i: int) -> Attention:
        """Attention of layer i."""
        a = self.arch
        kind = a.layer_types[i]
        return Attention(
            qkv=self.qkv(),
            output=self.output(),
            num_heads=a.num_heads,
            num_kv_heads=a.num_kv_heads,
            head_dim=a.head_dim,
            scale=(a.query_scale or a.head_dim) ** -0.5,
            rope=self.rope(i),
            window=a.sliding_window if kind == "sliding_attention" else 0,
            softcap=a.attention_softcap,
            q_norm=self.norm("self_attn.q_norm", "attn_q_norm", a.head_dim) if self.qk_norm else None,
            k_norm=self.norm("self_attn.k_norm", "attn_k_norm", a.head_dim) if self.qk_norm else None,
        )

    def qkv(self) -> Linear:
        """Queries, keys and values of one layer."""
        a = self.arch
        turned, hf_turned = self.gguf_permuted_rope, self.hf_permuted_rope
        rope = self.rope_parameters(0)
        rotated = rope.dim if rope.dim < a.head_dim else 0
        parts = [
            Part(f"self_attn.{name}_proj", f"attn_{name}", heads * a.head_dim, heads * turned,
                 hf_heads=heads * hf_turned, rotated=rotated)
            for name, heads in (("q", a.num_heads), ("k", a.num_kv_heads))
        ]  # fmt: skip
        parts.append(Part("self_attn.v_proj", "attn_v", a.num_kv_heads * a.head_dim))
        return self.linear(parts, a.hidden_size, bias=self.qkv_bias())

    def output(self) -> Linear:
        """The projection behind attention."""
        a = self.arch
        part = Part("self_attn.o_proj", "attn_output", a.hidden_size)
        return self.linear([part], a.num_heads * a.head_dim, bias=self.output_bias(), row=True)

    def with_whole_norms(self, attention: Attention) -> Attention:
        """q and k normed over all heads together, as OLMo does."""
        a = self.arch
        return replace(
            attention,
            q_norm=self.norm("self_attn.q_norm", "attn_q_norm", a.num_heads * a.head_dim),
            k_norm=self.norm("self_attn.k_norm", "attn_k_norm", a.num_kv_heads * a.head_dim),
        )

    def rope(self, i: int) -> Rope | None:
        """Position encoding of layer i."""
        return self.rope_parameters(i)

    def rope_parameters(self, i: int) -> Rope:
        """What the configuration says about layer i, whether it rotates or not."""
        a = self.arch
        return build_rope(a.head_dim, a.rope[a.layer_types[i]], a.max_position)

    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases."""
        return self.arch.attention_bias

    def output_bias(self) -> bool:
        """Whether the attention output has a bias."""
        return self.arch.attention_bias

    def mlp_bias(self) -> bool:
        """Whether the MLP has biases."""
        return self.arch.mlp_bias

    def mlp(self, i: int) -> FeedForward:
        """What stands behind the attention of layer i."""
        return self.gated_mlp()

    def gated_mlp(self, prefix: str = "mlp", inner: int | None = None, gguf_suffix: str = "") -> GatedMLP:
        """A gated MLP of ``inner`` channels (default: the configuration's)."""
        a = self.arch
        if a.activation == "relu2":
            raise UnsupportedModelError("config.json: squared ReLUs are supported without a gate only.")
        inner = inner or a.intermediate_size
        parts = [
            Part(f"{prefix}.gate_proj", f"ffn_gate{gguf_suffix}", inner),
            Part(f"{prefix}.up_proj", f"ffn_up{gguf_suffix}", inner),
        ]
        down = [Part(f"{prefix}.down_proj", f"ffn_down{gguf_suffix}", a.hidden_size)]
        return GatedMLP(
            gate_up=self.linear(parts, a.hidden_size, bias=self.mlp_bias()),
            down=self.linear(down, inner, bias=self.mlp_bias(), row=True),
            intermediate=inner,
            activation=a.activation,
        )

    def router(
        self, num: int, top_k: int, *, hf: str = "mlp.gate", bias: bool = False, renormalize: bool = True
    ) -> Router:
        """A softmax router over ``num`` experts; raises ``ModelFileError`` where it cannot choose ``top_k`` of them."""
        if top_k > num:
            raise ModelFileError(f"config.json: {top_k} of {num} experts cannot be chosen.")
        part = Part(hf, "ffn_gate_inp", num)
        linear = Linear(self.arch.hidden_size, (part,), bias)
        return Router(linear, top_k, renormalize=renormalize)

    def corrected_router(self) -> Router:
        """DeepSeek-V3's router: sigmoid scores; groups and a correction guide the choice."""
        keys = self.keys
        num, groups = keys.integer("num_experts"), keys.integer("n_group", 1)
        top_groups, top_k = keys.integer("topk_group", 1), keys.integer("num_experts_per_tok")
        if num % groups or top_groups > groups or top_k > top_groups * (num // groups):
            raise ModelFileError(
                f"config.json: {top_k} of {num} experts in {top_groups} of {groups} groups cannot be chosen."
            )
        return replace(
            self.router(num, top_k, renormalize=keys.flag("norm_topk_prob", True)),
            scoring="sigmoid",
            scale=keys.number("routed_scaling_factor", 1.0),
            groups=groups,
            top_groups=top_groups,
            correction="mlp.gate.e_score_correction_bias",
            gguf_correction="exp_probs_b.bias",
        )

    def shared_experts(self, router: Router, inner: int) -> MoE:
        """Experts of ``inner`` channels and shared ones, which every token visits."""
        keys = self.keys
        shared = keys.integer("n_shared_experts", 1)
        return MoE(
            router,
            self.experts(keys.integer("num_experts"), inner),
            self.arch.activation,
            shared=self.gated_mlp("mlp.shared_experts", shared * inner, "_shexp"),
        )

    def drafting_layers(self, default: int) -> tuple[str, ...]:
        """Prefixes of the layers behind the last, which predict further tokens: they are not loaded."""
        count, more = self.arch.num_layers, self.keys.integer("num_nextn_predict_layers", default, least=0)
        return tuple(f"model.layers.{count + i}." for i in range(more))

    def is_sparse(self, i: int) -> bool:
        """Whether layer i has experts, in Qwen's way of saying so."""
        dense = self.keys.source.get("mlp_only_layers") or []
        if not isinstance(dense, list):
            raise ModelFileError(f"config.json: mlp_only_layers must be a list, got {dense!r}.")
        return i not in dense and (i + 1) % self.keys.integer("decoder_sparse_step", 1) == 0

    def experts(self, num: int, inner: int, hf: str = "mlp.experts") -> Experts:
        """``num`` gated MLPs of ``inner`` channels."""
        if self.arch.activation == "relu2":
            raise UnsupportedModelError("config.json: squared ReLUs are supported without a gate only.")
        return Experts(hf, num, self.arch.hidden_size, inner)

    def plain_mlp(self, up: str, down: str, *, bias: bool) -> PlainMLP:
        """An MLP without gate; ``up`` and ``down`` are its Hugging Face names."""
        a = self.arch
        return PlainMLP(
            up=self.linear([Part(up, "ffn_up", a.intermediate_size)], a.hidden_size, bias=bias),
            down=self.linear(
                [Part(down, "ffn_down", a.hidden_size)], a.intermediate_size, bias=bias, row=True
            ),
            intermediate=a.intermediate_size,
            activation=a.activation,
        )
