"""GPT-NeoX, Pythia: parallel branches, partial rotation, q, k and v of each head stored together (Black et al. 2022)."""

from __future__ import annotations

from dataclasses import replace

from octavo.model.blocks import DecoderSpec, Embedding, FeedForward, Layer, Linear, Part
from octavo.model.decoder import Decoder


class GPTNeoX(Decoder):
    """LayerNorm with bias, plain MLP; ``use_parallel_residual`` off makes the branches follow each other."""

    norm_kind = "layer"
    norm_bias = True

    def spec(self) -> DecoderSpec:
        a, spec = self.arch, super().spec()
        head = None
        if spec.head is not None:
            head = self.linear([Part("embed_out", "output", a.vocab_size)], a.hidden_size)
        return replace(
            spec,
            norm=self.norm("gpt_neox.final_layer_norm", "output_norm"),
            head=head,
            hf_layer_prefix="gpt_neox.layers.{}.",
            ignored=(*spec.ignored, ".attention.bias", ".attention.masked_bias"),
        )

    def embedding(self) -> Embedding:
        return replace(super().embedding(), hf="gpt_neox.embed_in")

    def layer(self, i: int) -> Layer:
        return replace(super().layer(i), parallel=self.keys.flag("use_parallel_residual", True))

    def qkv(self) -> Linear:
        a = self.arch
        rows = a.num_heads * a.head_dim
        whole = Part("attention.query_key_value", "attn_qkv", 0, stored="per_head", stored_heads=a.num_heads)
        return self.linear(self.slices(whole, [rows] * 3), a.hidden_size, bias=a.attention_bias)

    def output(self) -> Linear:
        a = self.arch
        part = Part("attention.dense", "attn_output", a.hidden_size)
        return self.linear([part], a.num_heads * a.head_dim, bias=a.attention_bias, row=True)

    def mlp(self, i: int) -> FeedForward:
        return self.plain_mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", bias=True)


FAMILY = GPTNeoX
