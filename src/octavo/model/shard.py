"""Tensor parallelism as a change of description: what one of ``size`` ranks computes (Shoeybi et al. 2019). No torch.

Column linears keep a slice of every part's rows, row linears a slice of the inputs, so that one sum over the ranks
after each row linear is all that layers exchange:

    qkv, gate_up (column)  ->  attention, act_mul on local heads and channels  ->  output, down (row)  ->  sum
"""

from __future__ import annotations

from dataclasses import replace

from octavo.errors import UnsupportedModelError
from octavo.model.blocks import (
    Attention,
    CompressedAttention,
    DecoderSpec,
    FeedForward,
    GatedMLP,
    LatentAttention,
    Layer,
    Linear,
    Mixer,
    MoE,
    Part,
    PlainMLP,
    Recurrent,
)


def shard(spec: DecoderSpec, size: int, *, expert_parallel: bool = False) -> DecoderSpec:
    """The local model of any of ``size`` ranks; its shapes are the same on all of them.

    The output head stays whole where the vocabulary does not divide. With ``expert_parallel`` a rank holds some experts
    whole instead of a slice of each. Raises ``UnsupportedModelError`` where heads or
    channels do not.
    """
    if size == 1:
        return spec
    head = spec.head
    if head is not None:
        head = replace(head, shard="none") if head.out_features % size else _linear(head, size)
    return replace(
        spec, layers=tuple(_layer(layer, size, expert_parallel) for layer in spec.layers), head=head
    )


def _layer(layer: Layer, size: int, expert_parallel: bool) -> Layer:
    mlp = layer.mlp
    return replace(
        layer,
        attention=_mixer(layer.attention, size),
        mlp=_whole_experts(mlp, size) if expert_parallel and isinstance(mlp, MoE) else _mlp(mlp, size),
    )


def _mixer(block: Mixer, size: int) -> Mixer:
    if isinstance(block, Recurrent):
        return _recurrent(block, size)
    if isinstance(block, LatentAttention):
        return _latent(block, size)
    if isinstance(block, CompressedAttention):
        return _compressed(block, size)
    return _attention(block, size)


def _recurrent(block: Recurrent, size: int) -> Recurrent:
    heads, key_heads = block.num_heads, block.num_key_heads
    if heads % size or (key_heads % size and size % key_heads):
        raise UnsupportedModelError(
            f"{heads} recurrent heads with {key_heads} key heads cannot be split over {size} devices.",
            "Choose a tensor parallel size that divides both (or is a multiple of the key heads).",
        )
    copies = (max(1, size // key_heads),) * 2 + (1, 1)  # q, k; v, gate
    return replace(
        block,
        project=replace(block.project, parts=tuple(map(_part, block.project.parts, (size,) * 4, copies))),
        small=_linear(block.small, size),
        output=_linear(block.output, size),
        conv=tuple(map(_part, block.conv, (size,) * 3, copies)),
        num_heads=heads // size,
        num_key_heads=key_heads * copies[0] // size,
        dt_bias=_part(block.dt_bias, size, 1),
        a_log=_part(block.a_log, size, 1),
        skip=_part(block.skip, size, 1) if block.skip is not None else None,
    )


def _check_divides(count: int, what: str, size: int) -> None:
    if count % size:
        raise UnsupportedModelError(
            f"{count} {what} cannot be split over {size} devices.",
            "Choose a tensor parallel size that divides them.",
        )


def _latent(block: LatentAttention, size: int) -> LatentAttention:
    """Heads are split; every rank keeps all latents, which belong to all heads."""
    _check_divides(block.num_heads, "attention heads", size)
    return replace(
        block,
        query=_linear(block.query, size),
        up=_linear(block.up, size),
        output=_linear(block.output, size),
        num_heads=block.num_heads // size,
    )


def _compressed(block: CompressedAttention, size: int) -> CompressedAttention:
    """Groups of heads are split; every rank keeps all keys and entries, which belong to all heads."""
    _check_divides(block.num_groups, "groups of attention heads", size)
    return replace(
        block,
        query=_linear(block.query, size),
        grouped=_linear(block.grouped, size),
        output=_linear(block.output, size),
        sinks=_part(block.sinks, size, 1),
        num_heads=block.num_heads // size,
        num_groups=block.num_groups // size,
    )


def _attention(block: Attention, size: int) -> Attention:
    heads, kv_heads = block.num_heads, block.num_kv_heads
    if heads % size or (kv_heads % size and size % kv_heads):
        raise UnsupportedModelError(
            f"{heads} attention heads with {kv_heads} key heads cannot be split over {size} devices.",
            "Choose a tensor parallel size that divides both (or is a multiple of the key heads).",
        )
    # With fewer key heads than ranks, neighbouring ranks hold the same one.
    copies = max(1, size // kv_heads)
    query, *shared = block.qkv.parts
    parts = (_part(query, size, 1), *(_part(part, size, copies) for part in shared))
    return replace(
        block,
        qkv=replace(block.qkv, parts=parts),
        output=_linear(block.output, size),
        gate=_linear(block.gate, size) if block.gate is not None else None,
        num_heads=heads // size,
        sinks=_part(block.sinks, size, 1) if block.sinks is not None else None,
        num_kv_heads=kv_heads * copies // size,
    )


def _mlp(block: FeedForward, size: int) -> FeedForward:
    channels = block.experts.intermediate if isinstance(block, MoE) else block.intermediate
    if channels % size:
        raise UnsupportedModelError(
            f"{channels} MLP channels cannot be split over {size} devices.",
            "Choose a tensor parallel size that divides them.",
        )
    if isinstance(block, MoE):
        experts = replace(block.experts, intermediate=channels // size)
        shared = _gated(block.shared, size) if block.shared is not None else None
        return replace(block, experts=experts, shared=shared)
    if isinstance(block, PlainMLP):
        return replace(
            block,
            up=_linear(block.up, size),
            down=_linear(block.down, size),
            intermediate=block.intermediate // size,
        )
    return _gated(block, size)


def _whole_experts(block: MoE, size: int) -> MoE:
    num = block.experts.num
    if num % size:
        raise UnsupportedModelError(
            f"{num} experts cannot be dealt to {size} devices.",
            "Choose a tensor parallel size that divides them, or leave out --enable-expert-parallel.",
        )
    shared = _gated(block.shared, size) if block.shared is not None else None
    return replace(block, experts=replace(block.experts, num=num // size, total=num), shared=shared)


def _gated(block: GatedMLP, size: int) -> GatedMLP:
    return replace(
        block,
        gate_up=_linear(block.gate_up, size),
        down=_linear(block.down, size),
        intermediate=block.intermediate // size,
    )


def _linear(block: Linear, size: int) -> Linear:
    if block.shard == "row":
        return replace(block, in_features=block.in_features // size)
    if block.shard == "column":
        return replace(block, parts=tuple(_part(part, size, 1) for part in block.parts))
    return block


def _part(part: Part, size: int, copies: int) -> Part:
    return replace(
        part,
        out_features=part.out_features * copies // size,
        heads=part.heads * copies // size,
        hf_heads=part.hf_heads * copies // size,
        copies=copies,
    )
