"""Our attention as one of transformers' attention implementations; it finds its pages through its module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from octavo.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor

ATTENTION = "octavo_paged"  # its name there


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over the pages of ``module.octavo``, a ``network.PagedLayer``."""
    strange = [name for name in ("position_bias", "alibi", "head_mask") if others.get(name) is not None]
    if attention_mask is not None or strange or not getattr(module, "is_causal", True):
        raise UnsupportedModelError(
            f"{type(module).__name__} attends in a way of its own ({', '.join(strange) or 'masks'}).",
            "This model cannot run through transformers here.",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return module.octavo(query, key, value, scale, sliding_window or 0, softcap or 0.0, s_aux), None
