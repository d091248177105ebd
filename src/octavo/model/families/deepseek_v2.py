"""DeepSeek V2 and V2-Lite: latent attention, experts weighed by a softmax that is not renormalized (DeepSeek-AI 2024)."""

from __future__ import annotations

from dataclasses import replace

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.model.blocks import Router
from octavo.model.latent import LatentDecoder


class DeepseekV2(LatentDecoder):
    """The large one chooses its experts from the groups with the best single experts."""

    def choice(self) -> Router:
        keys = self.keys
        num, top_k = keys.integer("num_experts"), keys.integer("num_experts_per_tok")
        router = replace(
            self.router(num, top_k, renormalize=keys.flag("norm_topk_prob", False)),
            scale=keys.number("routed_scaling_factor", 1.0),
        )
        method = keys.source.get("topk_method") or "greedy"
        if method == "greedy":
            return router
        if method != "group_limited_greedy":
            raise UnsupportedModelError(f"config.json: topk_method {method!r} is not supported.")
        groups, top_groups = keys.integer("n_group"), keys.integer("topk_group")
        if num % groups or top_groups > groups or top_k > top_groups * (num // groups):
            raise ModelFileError(
                f"config.json: {top_k} of {num} experts in {top_groups} of {groups} groups cannot be chosen."
            )
        return replace(router, groups=groups, top_groups=top_groups, group_best=1)


FAMILY = DeepseekV2
