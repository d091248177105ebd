"""DeepSeek V3.2: V3 whose queries see only the keys that a small indexer chooses (DeepSeek-AI 2025)."""

from __future__ import annotations

from dataclasses import replace

from octavo.errors import UnsupportedModelError
from octavo.model.blocks import Indexer, LatentAttention, Linear, Norm, Part
from octavo.model.latent import LATENT_EPS, LatentDecoder


class DeepseekV32(LatentDecoder):
    """The indexer is the same on all tensor parallel ranks: it sees all heads' queries before they are split."""

    def mixer(self, i: int) -> LatentAttention:
        a, keys, attention = self.arch, self.keys, super().mixer(i)
        if attention.query_norm is None:
            raise UnsupportedModelError("config.json: DeepSeek V3.2 without q_lora_rank is not supported.")
        heads, size = keys.integer("index_n_heads", 64), keys.integer("index_head_dim", 128)
        if size < attention.rope_dim:
            raise UnsupportedModelError(
                f"config.json: index_head_dim {size} is below qk_rope_head_dim {attention.rope_dim}."
            )
        name = "self_attn.indexer."
        indexer = Indexer(
            query=Linear(attention.query_norm.size, (Part(f"{name}wq_b", "indexer.attn_q_b", heads * size),)),
            key=Linear(a.hidden_size, (Part(f"{name}wk", "indexer.attn_k", size),)),
            key_norm=Norm(f"{name}k_norm", "indexer.k_norm", size, LATENT_EPS, kind="layer", bias=True),
            weights=Linear(a.hidden_size, (Part(f"{name}weights_proj", "indexer.proj", heads),)),
            num_heads=heads,
            head_dim=size,
            top_k=keys.integer("index_topk", 2048),
        )
        return replace(attention, indexer=indexer)


FAMILY = DeepseekV32
