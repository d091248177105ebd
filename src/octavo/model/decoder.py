"""The shape every decoder-only family shares; a family states only what differs (rule R4). No torch."""

from __future__ import annotations

from octavo.model.arch import ArchConfig
from octavo.model.blocks import (
    Attention,
    DecoderSpec,
    Embedding,
    GatedMLP,
    Layer,
    Linear,
    Norm,
    Part,
)
from octavo.model.rope import build_rope


class Decoder:
    """Llama's shape: pre-norm attention and gated MLP. Subclasses override the pieces that differ."""

    qk_norm = False
    norm_offset = 0.0
    gguf_permuted_rope = False  # GGUF stores q and k with interleaved rotary pairs

    def __init__(self, arch: ArchConfig) -> None:
        self.arch = arch

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
            attention=self.attention(i),
            pre_mlp_norm=self.norm("post_attention_layernorm", "ffn_norm"),
            mlp=self.mlp(),
        )

    def norm(self, hf: str, gguf: str, size: int | None = None) -> Norm:
        """An RMSNorm over the hidden size or over ``size`` values."""
        return Norm(hf, gguf, size or self.arch.hidden_size, self.arch.norm_eps, self.norm_offset)

    def linear(self, parts: list[Part], in_features: int, *, bias: bool = False, row: bool = False) -> Linear:
        """A projection, split by columns under tensor parallelism unless ``row``."""
        return Linear(in_features, tuple(parts), bias, "row" if row else "column")

    def attention(self, i: int) -> Attention:
        """Attention of layer i."""
        a = self.arch
        q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        turned = self.gguf_permuted_rope
        qkv = [
            Part("self_attn.q_proj", "attn_q", q, a.num_heads if turned else 0),
            Part("self_attn.k_proj", "attn_k", kv, a.num_kv_heads if turned else 0),
            Part("self_attn.v_proj", "attn_v", kv),
        ]
        kind = a.layer_types[i]
        return Attention(
            qkv=self.linear(qkv, a.hidden_size, bias=self.qkv_bias()),
            output=self.linear(
                [Part("self_attn.o_proj", "attn_output", a.hidden_size)], q, bias=self.output_bias(), row=True
            ),
            num_heads=a.num_heads,
            num_kv_heads=a.num_kv_heads,
            head_dim=a.head_dim,
            scale=(a.query_scale or a.head_dim) ** -0.5,
            rope=build_rope(a.head_dim, a.rope[kind], a.max_position),
            window=a.sliding_window if kind == "sliding_attention" else 0,
            softcap=a.attention_softcap,
            q_norm=self.norm("self_attn.q_norm", "attn_q_norm", a.head_dim) if self.qk_norm else None,
            k_norm=self.norm("self_attn.k_norm", "attn_k_norm", a.head_dim) if self.qk_norm else None,
        )

    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases."""
        return self.arch.attention_bias

    def output_bias(self) -> bool:
        """Whether the attention output has a bias."""
        return self.arch.attention_bias

    def mlp(self) -> GatedMLP:
        """The gated MLP."""
        a = self.arch
        parts = [
            Part("mlp.gate_proj", "ffn_gate", a.intermediate_size),
            Part("mlp.up_proj", "ffn_up", a.intermediate_size),
        ]
        down = [Part("mlp.down_proj", "ffn_down", a.hidden_size)]
        return GatedMLP(
            gate_up=self.linear(parts, a.hidden_size, bias=a.mlp_bias),
            down=self.linear(down, a.intermediate_size, bias=a.mlp_bias, row=True),
            intermediate=a.intermediate_size,
            activation=a.activation,
        )
