"""GPT-2: learned positions, LayerNorm, plain MLP, matrices stored transposed (Radford et al. 2019)."""

from __future__ import annotations

from dataclasses import replace

from octavo.errors import UnsupportedModelError
from octavo.model.arch import ArchConfig
from octavo.model.blocks import DecoderSpec, Embedding, FeedForward, Layer, Linear, Part, PlainMLP, Rope
from octavo.model.decoder import Decoder


class GPT2(Decoder):
    """Pre-norm layers without rope."""

    norm_kind = "layer"
    norm_bias = True

    def __init__(self, arch: ArchConfig) -> None:
        super().__init__(arch)
        if self.keys.flag("scale_attn_by_inverse_layer_idx", False) or not self.keys.flag(
            "scale_attn_weights", True
        ):
            raise UnsupportedModelError("config.json: GPT-2 with other attention scales is not supported.")

    def spec(self) -> DecoderSpec:
        a, spec = self.arch, super().spec()
        return replace(
            spec,
            norm=self.norm("transformer.ln_f", "output_norm"),
            positions=Embedding("transformer.wpe", "position_embd", a.max_position, a.hidden_size),
            hf_layer_prefix="transformer.h.{}.",
            bare_prefix="transformer.",
            ignored=(*spec.ignored, ".attn.bias", ".attn.masked_bias"),
        )

    def embedding(self) -> Embedding:
        return replace(super().embedding(), hf="transformer.wte")

    def layer(self, i: int) -> Layer:
        return Layer(
            input_norm=self.norm("ln_1", "attn_norm"),
            attention=self.mixer(i),
            pre_mlp_norm=self.norm("ln_2", "ffn_norm"),
            mlp=self.mlp(i),
        )

    def rope(self, i: int) -> Rope | None:
        return None

    def qkv(self) -> Linear:
        size = self.arch.hidden_size
        whole = Part("attn.c_attn", "attn_qkv", 0, stored="transposed")
        return self.linear(self.slices(whole, [size] * 3), size, bias=True)

    def output(self) -> Linear:
        return self.transposed("attn.c_proj", "attn_output", self.arch.hidden_size, row=True)

    def mlp(self, i: int) -> FeedForward:
        a = self.arch
        up = [Part("mlp.c_fc", "ffn_up", a.intermediate_size, stored="transposed")]
        return PlainMLP(
            up=self.linear(up, a.hidden_size, bias=True),
            down=self.transposed("mlp.c_proj", "ffn_down", a.intermediate_size, row=True),
            intermediate=a.intermediate_size,
            activation=a.activation,
        )

    def transposed(self, hf: str, gguf: str, in_features: int, *, row: bool) -> Linear:
        """A projection to the hidden size, stored [in, out]."""
        part = Part(hf, gguf, self.arch.hidden_size, stored="transposed")
        return self.linear([part], in_features, bias=True, row=row)


FAMILY = GPT2
