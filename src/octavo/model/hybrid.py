"""What decoders with recurrent layers share: blocks for the gated delta rule, Mamba-2 and gated attention. No torch."""

from __future__ import annotations

from dataclasses import replace

from octavo.errors import ModelFileError
from octavo.model.blocks import Attention, FeedForward, Linear, Mixer, MoE, Norm, Part, Recurrent
from octavo.model.decoder import Decoder

LINEAR = "linear_attention"


class GatedDeltaDecoder(Decoder):
    """Qwen3-Next's shape: gated delta rule layers with a gated attention every few layers."""

    qk_norm = True
    norm_offset = 1.0
    joint = True  # one stored projection for q, k, v and gate, ordered by key head

    def mixer(self, i: int) -> Mixer:
        return self.delta() if self.arch.layer_types[i] == LINEAR else self.gated_attention(i)

    def gated_attention(self, i: int) -> Attention:
        """Attention of layer i; each head's gate is stored behind its query."""
        a = self.arch
        rows = a.num_heads * a.head_dim
        pieces = (a.head_dim, a.head_dim)
        whole = Part(
            "self_attn.q_proj", "attn_q", 0, stored="per_head", stored_heads=a.num_heads, stored_pieces=pieces
        )
        query, gate = self.slices(whole, [rows, rows])
        found = self.attention(i)
        _, *shared = found.qkv.parts
        return replace(
            found,
            qkv=replace(found.qkv, parts=(query, *shared)),
            gate=self.linear([gate], a.hidden_size, bias=found.qkv.bias),
        )

    def delta(self) -> Recurrent:
        """A gated delta rule layer."""
        keys, a = self.keys, self.arch
        num, num_keys = keys.heads("linear_num_value_heads", "linear_num_key_heads")
        key_dim, value_dim = (keys.integer(f"linear_{name}_head_dim", 128) for name in ("key", "value"))
        shared = num // num_keys
        queries, values = num_keys * key_dim, num * value_dim
        sizes = [queries, queries, values]
        if self.joint:
            pieces = (key_dim, key_dim, shared * value_dim, shared * value_dim)
            whole = Part("linear_attn.in_proj_qkvz", "ssm_in", 0, stored="per_head", stored_heads=num_keys)
            projected = self.slices(replace(whole, stored_pieces=pieces), [*sizes, values])
            rates = Part("linear_attn.in_proj_ba", "ssm_ba", 0, stored="per_head", stored_heads=num_keys)
            b, step = self.slices(replace(rates, stored_pieces=(shared, shared)), [num, num])
        else:
            gate = Part("linear_attn.in_proj_z", "attn_gate", values)
            projected = [*self.slices(Part("linear_attn.in_proj_qkv", "attn_qkv", 0), sizes), gate]
            b = Part("linear_attn.in_proj_b", "ssm_beta", num)
            step = Part("linear_attn.in_proj_a", "ssm_alpha", num)
        out = Part("linear_attn.out_proj", "ssm_out", a.hidden_size)
        return Recurrent(
            kind="delta",
            project=self.linear(projected, a.hidden_size),
            small=self.linear([step, b], a.hidden_size),
            output=self.linear([out], values, row=True),
            conv=tuple(self.slices(Part("linear_attn.conv1d", "ssm_conv1d", 0), sizes)),
            conv_width=keys.integer("linear_conv_kernel_dim", 4, least=2, most=16),
            conv_bias=False,
            num_key_heads=num_keys,
            num_heads=num,
            key_dim=key_dim,
            value_dim=value_dim,
            dt_bias=Part("linear_attn.dt_bias", "ssm_dt.bias", num),
            a_log=Part("linear_attn.A_log", "ssm_a", num),
            norm=Norm("linear_attn.norm", "ssm_norm", value_dim, a.norm_eps),
        )

    def shared_moe(self) -> MoE:
        """Fine-grained experts and a gated shared one."""
        keys = self.keys
        num = keys.integer("num_experts")
        router = self.router(
            num, keys.integer("num_experts_per_tok"), renormalize=keys.flag("norm_topk_prob", True)
        )
        gate = Part("mlp.shared_expert_gate", "ffn_gate_inp_shexp", 1)
        inner = keys.integer("shared_expert_intermediate_size")
        return MoE(
            router,
            self.experts(num, keys.integer("moe_intermediate_size")),
            self.arch.activation,
            shared=self.gated_mlp("mlp.shared_expert", inner, "_shexp"),
            shared_gate=Linear(self.arch.hidden_size, (gate,)),
        )

    def mlp(self, i: int) -> FeedForward:
        sparse = self.keys.integer("num_experts", 0, least=0) > 0 and self.is_sparse(i)
        return self.shared_moe() if sparse else self.gated_mlp()


def mamba2(decoder: Decoder, prefix: str = "mamba", inner: int = 0) -> Recurrent:
    """A Mamba-2 layer as Bamba and Granite name it; ``inner`` 0 = the configuration's expansion of the hidden size."""
    keys, a = decoder.keys, decoder.arch
    heads, groups = keys.integer("mamba_n_heads"), keys.integer("mamba_n_groups", 1)
    state = keys.integer("mamba_d_state")
    inner = inner or keys.integer("mamba_expand", 2) * a.hidden_size
    if inner % heads or heads % groups:
        raise ModelFileError(f"config.json: {inner} channels, mamba_n_heads {heads} and mamba_n_groups {groups} "
                             "do not divide.")  # fmt: skip
    if keys.flag("mamba_proj_bias", False):
        raise ModelFileError("config.json: mamba_proj_bias is not supported.")
    shared = groups * state
    # Stored order: gate, x, B, C, step size; ours: q (C), k (B), v (x), then the gate.
    gate, x, b, c, step = decoder.slices(
        Part(f"{prefix}.in_proj", "ssm_in", 0), [inner, inner, shared, shared, heads]
    )
    conv_x, conv_b, conv_c = decoder.slices(
        Part(f"{prefix}.conv1d", "ssm_conv1d", 0), [inner, shared, shared]
    )
    return Recurrent(
        kind="ssd",
        project=decoder.linear([c, b, x, gate], a.hidden_size),
        small=decoder.linear([step], a.hidden_size),
        output=decoder.linear([Part(f"{prefix}.out_proj", "ssm_out", a.hidden_size)], inner, row=True),
        conv=(conv_c, conv_b, conv_x),
        conv_width=keys.integer("mamba_d_conv", 4, least=2, most=16),
        conv_bias=keys.flag("mamba_conv_bias", True),
        num_key_heads=groups,
        num_heads=heads,
        key_dim=state,
        value_dim=inner // heads,
        dt_bias=Part(f"{prefix}.dt_bias", "ssm_dt.bias", heads),
        a_log=Part(f"{prefix}.A_log", "ssm_a", heads),
        skip=Part(f"{prefix}.D", "ssm_d", heads),
        norm=Norm(f"{prefix}.norm", "ssm_norm", inner, a.norm_eps),
        norm_groups=groups,
        gate_first=True,
    )
